// Softmax and negative log-likelihood in one pass, row by row: terms[r] = log sum_v exp(z[r, v]) - z[r, target[r]],
// dz[r] = (softmax(z[r]) - onehot(target[r])) * scale. Probabilities are never stored to compute a loss.
// A row does not count, and gets zeros, where its target is the ignored id or its step lies past the sequence's end.

struct CrossEntropy {
    rows: u32,     // T * B
    classes: u32,
    batch: u32,    // B: row r is step r / B of sequence r % B
    ignored: u32,  // this target does not count; 2^32 - 1: none
    ragged: u32,   // 1: steps past lengths[sequence] do not count
    gradient: u32, // 1: write dz
    scale: f32,    // 1 / counted rows
}

@group(0) @binding(0) var<uniform> params: CrossEntropy;
@group(0) @binding(1) var<storage, read> z: array<f32>;
@group(0) @binding(2) var<storage, read> targets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read_write> terms: array<f32>;
@group(0) @binding(5) var<storage, read_write> dz: array<f32>;

const LANES = 64u;
var<workgroup> partial: array<f32, LANES>;

@compute @workgroup_size(LANES)
fn cross_entropy(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = group.x; row < params.rows; row += groups.x) {
        let first = row * params.classes;
        let wanted = targets[row];
        var counts = wanted != params.ignored;
        if params.ragged == 1u {
            counts = counts && row / params.batch < lengths[row % params.batch];
        }
        if !counts {
            if lane == 0u { terms[row] = 0.0; }
            if params.gradient == 1u {
                for (var v = lane; v < params.classes; v += LANES) { dz[first + v] = 0.0; }
            }
            continue;
        }

        // max() may hide NaN here: the sum below still sees it.
        var top = z[first];
        for (var v = lane; v < params.classes; v += LANES) { top = max(top, z[first + v]); }
        top = workgroup_max(lane, top);
        var sum = 0.0;
        for (var v = lane; v < params.classes; v += LANES) { sum += exp_f32(z[first + v] - top); }
        sum = workgroup_sum(lane, sum);

        if lane == 0u { terms[row] = log_f32(sum) + (top - z[first + wanted]); }
        if params.gradient == 1u {
            let factor = params.scale / sum;
            for (var v = lane; v < params.classes; v += LANES) {
                let likelihood = exp_f32(z[first + v] - top) * factor;
                dz[first + v] = likelihood - select(0.0, params.scale, v == wanted);
            }
        }
    }
}

fn workgroup_max(lane: u32, value: f32) -> f32 {
    workgroupBarrier(); // the last result was read by all
    partial[lane] = value;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half { partial[lane] = max(partial[lane], partial[lane + half]); }
    }
    workgroupBarrier();
    return partial[0];
}

fn workgroup_sum(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    partial[lane] = value;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if lane < half { partial[lane] += partial[lane + half]; }
    }
    workgroupBarrier();
    return partial[0];
}
