//! The `gatefold` command, run as a user runs it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/cases");

/// What a run came to: exit status, output, errors.
struct Ran {
    status: i32,
    out: String,
    err: String,
}

fn gatefold(args: &[&str], environment: &[(&str, &str)]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gatefold"));
    // What the caller has set would change the answers.
    for name in ["GATEFOLD_DEVICE", "BENCH_REF", "BENCH_ONLY", "BENCH_MODES", "BENCH_QUIET_WAIT", "BENCH_MIN_RUNS"] {
        command.env_remove(name);
    }
    command.envs([("BENCH_BUDGET", "0.01"), ("BENCH_WARM", "0")]);
    let output = command.args(args).envs(environment.iter().copied()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { status: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

#[track_caller]
fn expect(ran: &Ran, status: i32, text: &str) {
    let Ran { status: given, out, err } = ran;
    assert_eq!(*given, status, "exit status; output:\n{out}\nerrors:\n{err}");
    let shown = if status == 0 { out } else { err };
    assert!(shown.contains(text), "no {text:?} in:\n{out}\nerrors:\n{err}");
}

#[test]
fn devices_marks_the_default_and_says_why() {
    let listed = gatefold(&["devices"], &[]);
    expect(&listed, 0, "name       cpu\n");
    expect(&listed, 0, "* default: ");
    assert_eq!(listed.out.lines().filter(|line| line.starts_with("* ")).count(), 2, "{}", listed.out);

    let named = gatefold(&["devices"], &[("GATEFOLD_DEVICE", "cpu")]);
    assert!(named.out.starts_with("* cpu (native"), "{}", named.out);
    expect(&named, 0, "because GATEFOLD_DEVICE is \"cpu\"");
    expect(&gatefold(&["devices"], &[("GATEFOLD_DEVICE", "nonesuch")]), 0, "no default: device: no device is named \"nonesuch\"");
}

/// A case file taken apart: its texts, and its tensors by name.
struct Case {
    texts: HashMap<String, String>,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Case {
    fn read(name: &str) -> Self {
        let bytes = std::fs::read(format!("{CASES}/{name}.safetensors")).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let owned = |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        Self { texts: header.metadata().clone().unwrap(), tensors: tensors.into_iter().map(owned).collect() }
    }

    fn write(&self, path: &Path) {
        let views = self.tensors.iter();
        let views = views.map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(path, safetensors::serialize(views, Some(self.texts.clone())).unwrap()).unwrap();
    }
}

#[test]
fn verify_passes_here_and_names_what_is_wrong_or_missing() {
    let passed = gatefold(&["verify", "--device", "cpu", "--cases", CASES], &[]);
    expect(&passed, 0, " passed, 0 failed, 0 unsupported");
    let row = |name: &str| passed.out.lines().find(|line| line.contains(name)).unwrap_or_default().to_owned();
    assert!(row("lstm_bidirectional").starts_with("  ok ") && row("lstm_saturated").starts_with("  ok "), "{}", passed.out);

    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).with_extension("safetensors");
    // One number of one gradient is off by a thousandth.
    let mut spoilt = Case::read("lstm_plain");
    let number = &mut spoilt.tensors.get_mut("grad.param.weight_hh_l0").unwrap().2[..8];
    number.copy_from_slice(&(f64::from_le_bytes((&*number).try_into().unwrap()) + 1e-3).to_le_bytes());
    spoilt.write(&path("spoilt"));
    // A case that overflows in float32, whoever computes it.
    let mut overflown = Case::read("lstm_plain");
    overflown.texts.insert("float32_error_gradients".into(), "nan".into());
    overflown.write(&path("foreign"));
    let folder = folder.path().to_str().unwrap();
    let failed = gatefold(&["verify", "--device", "cpu", "--cases", folder], &[("GATEFOLD_DEVICE", "nonesuch")]);
    expect(&failed, 1, "");
    assert!(failed.out.contains(", 1 failed, 1 unsupported"), "{}", failed.out);
    let wrong: Vec<&str> = failed.out.lines().filter(|line| line.contains("FAIL")).collect();
    assert_eq!(wrong.len(), 2, "{}", failed.out);
    assert!(wrong.iter().all(|line| line.contains("spoilt") && line.ends_with(" grad.param.weight_hh_l0")), "{wrong:?}");
    let unsupported = failed.out.lines().find(|line| line.contains("foreign")).unwrap();
    assert!(
        unsupported.contains("unsupported") && unsupported.ends_with("it overflows in float32, in PyTorch too"),
        "{unsupported}"
    );

    std::fs::write(path("torn"), "not a case").unwrap();
    let unread = gatefold(&["verify", "--device", "cpu", "--cases", folder], &[]);
    expect(&unread, 1, "torn.safetensors: not a safetensors file");
    assert_eq!(unread.out, "", "nothing should run before the files are read");
}

#[test]
fn bench_prints_lines_of_the_common_schema() {
    let ran = gatefold(&["bench", "--device", "cpu", "--shape", "3,2,4,5", "--shape", "1,1,1,1", "--json"], &[]);
    expect(&ran, 0, "");
    let lines: Vec<serde_json::Value> = ran.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found: Vec<_> =
        lines.iter().map(|line| (line["T"].as_u64(), line["H"].as_u64(), line["mode"].as_str().unwrap())).collect();
    let expected = [(3, 5, "infer"), (3, 5, "train"), (1, 1, "infer"), (1, 1, "train")];
    assert_eq!(found, expected.map(|(t, h, mode)| (Some(t), Some(h), mode)));
    for line in &lines {
        assert_eq!((&line["peer"], &line["cell"]), (&"gatefold".into(), &"lstm".into()), "{line}");
        assert!(line["device"].as_str().unwrap().starts_with("cpu"), "{line}");
        assert!(line["B"].is_u64() && line["I"].is_u64() && line["runs"].as_u64().unwrap() >= 5, "{line}");
        let [median, min, first] = ["ms_median", "ms_min", "first_ms"].map(|field| line[field].as_f64().unwrap());
        assert!(0.0 < min && min <= median && first > 0.0, "{line}");
        assert!(line["other_cpu"].is_f64() || !cfg!(target_os = "linux"), "{line}");
    }

    let table = gatefold(&["bench", "--device", "cpu", "--shape", "3,2,4,5", "--mode", "train"], &[]);
    expect(&table, 0, "GFLOP/s");
    assert!(table.out.contains("train") && !table.out.contains("infer"), "{}", table.out);
    let two = gatefold(&["bench", "--device", "cpu", "--json", "--mode", "infer"], &[("BENCH_ONLY", "_1_128,lstm_100_32_128")]);
    assert_eq!(two.out.lines().count(), 2, "{}", two.out);
}

#[test]
fn bench_checks_its_answers_before_it_times() {
    // Weights of zero give an output of zero. T, B, I, H = 3, 2, 4, 5.
    let (x, y, state, params) = (3 * 2 * 4, 3 * 2 * 5, 2 * 5, 20 * 4 + 20 * 5 + 2 * 20);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lstm_3_2_4_5.bin");
    let run = |numbers: &[f32]| {
        std::fs::write(&file, bytemuck::cast_slice(numbers)).unwrap();
        let folder = folder.path().to_str().unwrap();
        gatefold(&["bench", "--device", "cpu", "--shape", "3,2,4,5", "--json"], &[("BENCH_REF", folder)])
    };
    let mut numbers = vec![0.0; 2 * (x + params + y + state)];
    let checked = run(&numbers);
    expect(&checked, 0, r#""mode":"check""#);
    assert_eq!(checked.out.lines().count(), 4, "{}", checked.out);
    *numbers.last_mut().unwrap() = 1.0;
    let wrong = run(&numbers);
    expect(&wrong, 1, "lstm_3_2_4_5 train: db_hh is off its reference by 1.0e0: not timed");
    assert_eq!(wrong.out.lines().count(), 3, "{}", wrong.out);
    expect(&run(&numbers[1..]), 1, "lstm_3_2_4_5.bin has 2268 bytes, expected 2272");
}

#[test]
fn wrong_arguments_are_told() {
    expect(&gatefold(&[], &[]), 2, "Usage");
    expect(&gatefold(&["train"], &[]), 2, "unrecognized subcommand 'train'");
    expect(&gatefold(&["bench", "--cell", "gru"], &[]), 2, "cells that exist: lstm");
    expect(&gatefold(&["bench", "--shape", "3,2,4"], &[]), 2, "expected 4 numbers T,B,I,H from 1");
    expect(&gatefold(&["bench", "--shape", "0,2,4,5"], &[]), 2, "expected 4 numbers T,B,I,H from 1");
    expect(&gatefold(&["bench", "--mode", "both"], &[]), 2, "possible values: infer, train");
    expect(&gatefold(&["verify", "--tolerance", "1e-5,NaN"], &[]), 2, "expected 2 numbers OUT,GRAD from 0");
    let absent = gatefold(&["verify", "--cases", "absent"], &[]);
    expect(&absent, 1, "absent: ");
    assert_eq!(absent.err.matches("os error").count(), 1, "{}", absent.err);
    expect(&gatefold(&["bench"], &[("BENCH_BUDGET", "long")]), 1, "BENCH_BUDGET is \"long\", expected a number from 0");
    for command in ["verify", "bench"] {
        let unknown = gatefold(&[command, "--device", "nonesuch"], &[]);
        expect(&unknown, 1, "no device is named \"nonesuch\", expected one of: cpu");
        expect(&gatefold(&[command], &[("GATEFOLD_DEVICE", "nonesuch")]), 1, "the default device: device: no device is named");
    }
}
