#!/usr/bin/env python3
"""Breaks the kernels one line at a time and looks whether the kernel tests see it: a test of the tests.

    tests/mutations.py [--only WORD]

Each entry below is an edit (file, old text, new text) and families of `tests/kernels.rs`, the quickest first, one of which must fail. The old text
occurs once in the file. Edited shaders are read at run time (GATEFOLD_EDITED_SHADER) and run on a Vulkan adapter, the first that the
tests list; an edit of Rust is built first and runs on the native CPU. Prints what survived, and ends with a count; exit code 1 when an edit
survived, could not be built, or no longer fits its file, or when a family fails without any edit.
"""

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a family may take, on a busy machine too.
SECONDS = 900
NO_END = f"no end in {SECONDS} s"

EDITS = [
    # LSTM
    ("shaders/cell_lstm.wgsl", "Slots(i, f, g, o));\n}\n\nfn cell_totals", "Slots(f, i, g, o));\n}\n\nfn cell_totals", ["lstm_layers", "lstm_sweep"]),
    ("shaders/cell_lstm.wgsl", "clip_to(cell_clip, f * previous[1] + i * g);", "clip_to(cell_clip, i * previous[1] + f * g);", ["lstm_layers", "lstm_sweep"]),
    ("shaders/cell_lstm.wgsl", "x[2] + (r[2] + p[2])", "x[2] + r[2]", ["lstm_layers", "lstm_sweep"]),
    ("shaders/cell_lstm.wgsl", "var df = dc * previous[1];", "var df = dc * g;", ["lstm_layers", "lstm_sweep"]),
    ("shaders/cell_lstm.wgsl", "Slots(di, df, dg, d_out)", "Slots(di, df, -dg, d_out)", ["lstm_layers", "lstm_sweep"]),
    ("shaders/cell_lstm.wgsl", "State(0.0, dc * f + di * p[4]", "State(0.0, dc * f - di * p[4]", ["networks"]),
    ("shaders/cell_lstm.wgsl", "peephole(p[6], c));", "peephole(p[6], previous[1]));", ["networks"]),
    ("shaders/cell_lstm.wgsl", "if coupled { di -= df;", "if coupled { di += df;", ["networks"]),
    ("shaders/cell_lstm.wgsl", "cell_clip > 0.0 && abs(free) > cell_clip", "cell_clip > 0.0 && abs(free) > 2.0 * cell_clip", ["networks"]),
    ("shaders/cell_lstm.wgsl", "State(d[0], d[1] + d[0] * o", "State(d[0], d[1] - d[0] * o", ["gradient_flow"]),
    # GRU
    ("shaders/cell_gru.wgsl", "(1.0 - z) * n + z * previous[0]", "z * n + (1.0 - z) * previous[0]", ["resident_cells", "networks"]),
    ("shaders/cell_gru.wgsl", "let q = r[2] + p[2];", "let q = r[2];", ["resident_cells", "networks"]),
    ("shaders/cell_gru.wgsl", "(previous[0] - n) * gate_slope(z)", "(n - previous[0]) * gate_slope(z)", ["resident_cells", "networks"]),
    ("shaders/cell_gru.wgsl", "select(dn * reset, q, reset_before)", "select(dn, q, reset_before)", ["resident_cells", "networks"]),
    ("shaders/cell_gru.wgsl", "select(gate, 3u, gate == 2u && !reset_before)", "select(gate, 3u, gate == 1u && !reset_before)", ["resident_cells", "networks"]),
    ("shaders/gru_reset.wgsl", "dh[at] += d * r;", "dh[at] = d * r;", ["gru_reset", "networks"]),
    # Other cells
    ("shaders/cell_rnn.wgsl", "let da = d[0] * clipped_slope", "let da = -d[0] * clipped_slope", ["resident_cells", "networks"]),
    ("shaders/cell_slstm.wgsl", "if g.past { da = d[3] - di; }", "if !g.past { da = d[3] - di; }", ["resident_cells", "networks"]),
    ("shaders/cell_slstm.wgsl", "dc * g.i * (1.0 - z * z)", "dc * g.i * (1.0 - z)", ["resident_cells", "networks"]),
    ("shaders/cell_indrnn.wgsl", "Unit(da * previous[0])", "Unit(da)", ["resident_cells", "networks"]),
    ("shaders/cell_min_gru.wgsl", "(1.0 - z) * previous[0] + z * g", "z * previous[0] + (1.0 - z) * g", ["resident_cells", "networks"]),
    # What every sweep does around a cell
    ("shaders/sweep_unit.wgsl", "return (t + is_reverse()) % params.depth;", "return t % params.depth;", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "return t < lengths[row];", "return t <= lengths[row];", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "select(0.0, state[0], valid)", "state[0]", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "k * previous[s] + (1.0 - k) * state[s]", "(1.0 - k) * previous[s] + k * state[s]", ["networks"]),
    ("shaders/sweep_unit.wgsl", "d[0] += kept.dy;", "d[0] = kept.dy;", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "d[s] += held_back[s];", "d[s] -= held_back[s];", ["networks"]),
    ("shaders/sweep_unit.wgsl", "params.start + t, row, unit", "t, row, unit", ["networks", "bptt"]),
    ("shaders/sweep_unit.wgsl", "return params.reverse ^ (side * params.opposite);", "return params.reverse;", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "return params.reverse ^ (side * params.opposite);", "return params.reverse ^ side;", ["wavefront"]),
    ("shaders/sweep_unit.wgsl", "let own = n + side * params.ahead;", "let own = n;", ["wavefront"]),
    ("shaders/sweep_unit.wgsl", "return side * params.next_weights;", "return 0u;", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "side * params.next_y + ", "", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_unit.wgsl", "select(params.key1, params.next_key1, is_next)", "params.key1", ["networks"]),
    # Sweeps
    ("shaders/sweep_step.wgsl", "PRODUCT && k < seen_count; k++", "PRODUCT && k + 1u < seen_count; k++", ["lstm_layers", "lstm_sweep"]),
    ("shaders/sweep_step.wgsl", "let at1 = seen_at(min(row + 1u, last));", "let at1 = seen_at(min(row, last));", ["lstm_layers", "lstm_sweep"]),
    ("shaders/step_projected.wgsl", "carried[at] = select(later, 0.0, ends_here);", "carried[at] = 0.0;", ["step_tiled"]),
    ("shaders/step_projected.wgsl", "return output_at(slot_before(", "return output_at(slot_after(", ["step_tiled"]),
    ("shaders/step_projected.wgsl", "side * params.next_carried + ", "", ["step_tiled"]),
    ("shaders/step_output.wgsl", "select(outputs[output_at(slot_before(t), row, unit)], o, valid)", "o", ["step_tiled"]),
    ("shaders/step_output.wgsl", "    d[0] = dh;\n", "", ["step_tiled"]),
    ("shaders/step_output.wgsl", "if biased { o += unit_values[side * params.next_unit + unit]; }", "", ["step_tiled"]),
    ("shaders/step_output.wgsl", "side * params.next_unit + ", "", ["step_tiled"]),
    ("shaders/step_reset.wgsl", "let reset = gate(slots[slot_at(t, row, 0u, unit)] + (r[0] + p[0]));", "let reset = gate(slots[slot_at(t, row, 0u, unit)] + r[0]);", ["step_tiled"]),
    ("shaders/step_reset.wgsl", "products[product_at(row, g, unit)] = r[g];", "products[product_at(row, g, unit)] = r[0];", ["step_tiled"]),
    ("shaders/step_candidate.wgsl", "row, unit)] += d * r;", "row, unit)] = d * r;", ["step_tiled"]),
    ("shaders/step_candidate.wgsl", "* gate_slope(r);", "* r;", ["step_tiled"]),
    ("shaders/sweep_step_subgroup.wgsl", "add_seen(&r, subgroupBroadcast(h, 3u), w + 3u * stride);", "add_seen(&r, subgroupBroadcast(h, 2u), w + 3u * stride);", ["step_row"]),
    ("shaders/sweep_step_subgroup.wgsl", "d += subgroupBroadcast(values, 1u) * weight_vectors[w + stride];", "d += subgroupBroadcast(values, 1u) * weight_vectors[w];", ["step_row"]),
    ("shaders/sweep_step_subgroup.wgsl", "(*sums)[g][7] += subgroupBroadcast(h, 7u) * w;", "(*sums)[g][7] += subgroupBroadcast(h, 6u) * w;", ["lstm_layers", "step_subgroup"]),
    ("shaders/sweep_step_subgroup.wgsl", "min(row + 24u + lane, last)", "min(row + 16u + lane, last)", ["lstm_layers", "step_subgroup"]),
    ("shaders/sweep_step_tiled.wgsl", "        workgroupBarrier();\n        if slice < half {", "        if slice < half {", ["step_tiled"]),
    ("shaders/sweep_step_tiled.wgsl", "if k < seen_width() && unit < made_count {", "if k + 1u < seen_width() && unit < made_count {", ["step_tiled"]),
    ("shaders/sweep_resident.wgsl", "    workgroupBarrier();\n    for (var other", "    for (var other", ["lstm_resident"]),
    ("shaders/sweep_resident.wgsl", "values[3] * resident[w + 3u]", "values[3] * resident[w + 2u]", ["lstm_resident"]),
    ("shaders/sweep_scan.wgsl", "b = step.x * b + step.y;", "b = b + step.y;", ["scans"]),
    ("shaders/sweep_scan.wgsl", "carries[a_at] * value + carries", "carries[a_at] * value - carries", ["scans"]),
    ("shaders/sweep_rows.wgsl", "vec4(0.0, part, 0.0, 0.0), g >= first_group", "vec4(0.0, part, 0.0, 0.0), g > first_group", ["networks"]),
    ("shaders/sweep_rows.wgsl", "gain_of(GATES + 1u, unit)", "gain_of(GATES, unit)", ["networks"]),
    ("shaders/sweep_rows.wgsl", "side * params.next_stats + ", "", ["networks"]),
    ("shaders/sweep_rows.wgsl", "side * params.next_norms + ", "", ["networks"]),
    ("shaders/sweep_rows.wgsl", "side * params.next_between + ", "", ["networks"]),
    ("shaders/sweep_rows.wgsl", "select(0.0, h, valid)", "h", ["networks"]),
    ("shaders/sweep_rows.wgsl", "dstates[at] = dh * value;", "dstates[at] = dh;", ["networks"]),
    ("shaders/sweep_rows.wgsl", "later[NORMED] +=", "later[NORMED] =", ["networks"]),
    ("shaders/sweep_rows.wgsl", "select(means.xy, means.zw, g >= first_group)", "means.xy", ["networks"]),
    # Products and sums
    ("shaders/gemm_subgroup.wgsl", "store_row(row + 31u, column, cw[7] + added);", "store_row(row + 31u, column, cz[7] + added);", ["gemm_subgroup"]),
    ("shaders/gemm_subgroup.wgsl", "if row < params.m && column < params.n {", "if row <= params.m && column < params.n {", ["gemm_subgroup"]),
    ("shaders/gemm_tiled.wgsl", "        workgroupBarrier();\n        next = by_k", "        next = by_k", ["gemm_tiled_128", "gemm"]),
    ("shaders/gemm_tiled.wgsl", "(*sums)[15] += a1.w * b1;", "(*sums)[15] += a1.z * b1;", ["gemm_tiled_128", "gemm"]),
    ("shaders/column_sum.wgsl", "let end = min(first + ROWS, params.rows);", "let end = min(first + ROWS - 1u, params.rows);", ["column_sum"]),
    ("shaders/reduce.wgsl", "        workgroupBarrier();\n", "", ["reduce"]),
    ("shaders/transpose.wgsl", "(row % params.a) * params.b + row / params.a", "(row / params.a) * params.b + row % params.a", ["transpose"]),
    ("shaders/gather.wgsl", "rank < starts[i + 1u]", "rank + 1u < starts[i + 1u]", ["scatter"]),
    # Losses, optimizers, masks, norms
    ("shaders/cross_entropy.wgsl", "select(0.0, params.scale, v == wanted)", "select(params.scale, 0.0, v == wanted)", ["cross_entropy"]),
    ("shaders/cross_entropy.wgsl", "        workgroupBarrier();\n        if lane < half { partial[lane] += ", "        if lane < half { partial[lane] += ", ["cross_entropy"]),
    ("shaders/cross_entropy.wgsl", "    workgroupBarrier(); // the last result was read by all\n", "", ["cross_entropy"]),
    ("shaders/mean_squared_error.wgsl", "2.0 * difference", "difference", ["mean_squared_error"]),
    ("shaders/optimizer.wgsl", "params.one_minus_beta2 * g * g", "params.one_minus_beta2 * g", ["adamw"]),
    ("shaders/optimizer.wgsl", "control.skip = select(1u, 0u, finite);", "control.skip = 0u;", ["sgd"]),
    ("shaders/optimizer.wgsl", "first[at] = velocity;", "first[at] = g;", ["sgd"]),
    ("shaders/dropout.wgsl", ">= params.p", "< params.p", ["dropout"]),
    ("shaders/gate_mask.wgsl", "params.first + gate, GATE", "gate, GATE", ["gate_mask"]),
    ("shaders/row_norm.wgsl", "- xhat * means.y", "+ xhat * means.y", ["layer_norm"]),
    ("shaders/row_norm.wgsl", "var other = 1u; other < EIGHT", "var other = 2u; other < EIGHT", ["layer_norm"]),
    ("shaders/output_step.wgsl", "targets[(params.t - 1u) * count + at]", "targets[params.t * count + at]", ["jordan"]),
    ("shaders/pooling.wgsl", "select(length - 1u, 0u, column", "select(length, 0u, column", ["pooling"]),
    ("shaders/math.wgsl", "(bits & ~SIGN_BIT) > 0x411051ecu", "(bits & ~SIGN_BIT) > 0x7f000000u", ["math"]),
    ("shaders/math.wgsl", "select(y | (bits & SIGN_BIT), bits, is_nan_bits(x))", "select(y, bits, is_nan_bits(x))", ["math"]),
    # The native CPU
    ("src/kernels/cell_lstm.rs", "return ([o * c.tanh::<F>(), c], [i, f, g, o]);", "return ([o * c.tanh::<F>(), c], [f, i, g, o]);", ["lstm_layers", "lstm_sweep"]),
    ("src/kernels/cell_lstm.rs", "[i, f, g, o])\n    }", "[f, i, g, o])\n    }", ["networks"]),
    ("src/kernels/cell_lstm.rs", "dc * c_before * (f * (one - f))", "dc * c_before * (i * (one - f))", ["lstm_layers", "lstm_sweep"]),
    ("src/kernels/cell_lstm.rs", "let (mut di, mut df) = (dc * g, dc * c_before);", "let (mut di, mut df) = (dc * c_before, dc * g);", ["networks"]),
    ("src/kernels/cell_gru.rs", "let q = r[2] + p[2];\n            let n", "let q = r[2];\n            let n", ["networks"]),
    ("src/kernels/cell_gru.rs", "let q = r[2] + p[2];\n        let part", "let q = r[2];\n        let part", ["networks"]),
    ("src/kernels/cell_gru.rs", "(previous[0] - n) * (z * (one - z))", "(n - previous[0]) * (z * (one - z))", ["networks"]),
    ("src/kernels/cell_gru.rs", "(previous[0] - n) * self.gate_slope::<F>(z)", "(n - previous[0]) * self.gate_slope::<F>(z)", ["networks"]),
]


class Tests:
    """The program of tests/kernels.rs as it was built last."""

    def build(self, is_quick=False):
        """Quick: hardly optimised, for an edit of Rust that is built once and run for seconds."""
        config = ["--config", "profile.dev.package.gatefold.opt-level=1"] if is_quick else []
        command = ["cargo", "test", *config, "--all-features", "--test", "kernels", "--no-run", "--message-format", "json"]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = re.findall(r'"executable":"([^"]*/kernels-[^"]*)"', built.stdout)
        if built.returncode != 0 or not found:
            return False
        self.program = found[-1]
        # What an adapter cannot run would pass whatever is broken.
        idle = self.listed("--ignored")
        self.names = [name for name in self.listed() if name not in idle]
        return True

    def listed(self, *which):
        """Looking for adapters takes a while: once for each program."""
        lines = subprocess.run([self.program, "--list", *which], capture_output=True, text=True, check=True).stdout.splitlines()
        return [line.removesuffix(": test") for line in lines if line.endswith(": test")]

    def name(self, device, family):
        """The first test of a family on a kind of device."""
        for name in self.names:
            if name.startswith(device) and name.endswith(f"::{family}"):
                return name
        sys.exit(f"mutations.py: no test of {family} can run on {device}")

    def failure(self, device, family, environment=None):
        """What a family prints where it fails, else None."""
        command = [self.program, "--exact", self.name(device, family)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return NO_END
        return run.stdout + run.stderr if run.returncode != 0 else None

    def first_failure(self, device, families, environment=None):
        return next((words for family in families if (words := self.failure(device, family, environment))), None)


def device_of(file):
    """The tests' device that runs a file."""
    return "vulkan" if file.endswith(".wgsl") else "cpu"


def outcome(tests, file, old, new, families):
    path = ROOT / file
    text = path.read_text()
    if text.count(old) != 1:
        return f"the old text occurs {text.count(old)} times"
    edited = text.replace(old, new)
    if file.endswith(".wgsl"):
        with tempfile.TemporaryDirectory() as folder:
            copy = pathlib.Path(folder) / path.name
            copy.write_text(edited)
            words = tests.first_failure(device_of(file), families, {**os.environ, "GATEFOLD_EDITED_SHADER": str(copy)})
        # A shader that does not compile proves nothing of the tests.
        if words and re.search(r"parsing error|validation error|GATEFOLD_EDITED_SHADER", words, re.IGNORECASE):
            return "the edited shader is not valid, or not read"
    else:
        try:
            path.write_text(edited)
            if not tests.build(is_quick=True):
                return "the edited source does not compile"
            words = tests.first_failure(device_of(file), families)
        finally:
            path.write_text(text)
    # That shows nothing either: an edit of Rust is hardly optimised.
    if words == NO_END:
        return words
    return None if words else "survived"


def main():
    # An edited source is put back then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("mutations.py: ended"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="edits of files with this in their name")
    arguments = parser.parse_args()
    # Shaders first: the program that they are read by is built once.
    edits = sorted((edit for edit in EDITS if arguments.only in edit[0]), key=lambda edit: not edit[0].endswith(".wgsl"))
    tests = Tests()
    if not tests.build():
        sys.exit("mutations.py: the tests do not build")
    for device, family in sorted({(device_of(file), family) for file, _, _, families in edits for family in families}):
        if words := tests.failure(device, family):
            sys.exit(f"mutations.py: {family} fails on {device} without any edit:\n{words}")
    caught, missed = 0, []
    for file, old, new, families in edits:
        start = time.monotonic()
        problem = outcome(tests, file, old, new, families)
        caught += problem is None
        line = f"{file}: {old.strip().splitlines()[0]} -> {(new.strip().splitlines() or ['(nothing)'])[0]}"
        print(f"{time.monotonic() - start:5.1f} s  {problem or 'caught'}  {line}", flush=True)
        if problem:
            missed.append(f"{problem}: {line}")
    print(*missed, sep="\n", end="\n" if missed else "")
    print(f"mutations: {caught} caught, {len(missed)} not")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
