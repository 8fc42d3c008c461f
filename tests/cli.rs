//! The `gatefold` command, run as a user runs it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

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
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).with_extension("safetensors");
    let written = folder.path().join("report.md");
    let passed = gatefold(&["verify", "--device", "cpu", "--cases", CASES, "--report", written.to_str().unwrap()], &[]);
    expect(&passed, 0, " passed, 0 failed\n");
    report_says_what_verify_printed(&passed.out, &written);
    let row = |name: &str| passed.out.lines().find(|line| line.contains(name)).unwrap_or_default().to_owned();
    assert!(row("lstm_bidirectional").starts_with("  ok ") && row("lstm_saturated").starts_with("  ok "), "{}", passed.out);

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
    assert!(failed.out.ends_with(" passed, 1 failed\n"), "{}", failed.out);
    let wrong: Vec<&str> = failed.out.lines().filter(|line| line.contains("FAIL")).collect();
    assert_eq!(wrong.len(), 2, "{}", failed.out);
    assert!(wrong[0].contains("spoilt") && wrong[1].contains(folder), "{wrong:?}");
    assert!(wrong.iter().all(|line| line.ends_with(" grad.param.weight_hh_l0")), "{wrong:?}");
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

/// The report that `verify --report` wrote on the native CPU, as Markdown and JSON.
fn report_says_what_verify_printed(out: &str, written: &Path) {
    let text = std::fs::read_to_string(written).unwrap();
    let reports: Value = serde_json::from_str(&std::fs::read_to_string(written.with_extension("json")).unwrap()).unwrap();
    let [report] = &reports.as_array().unwrap()[..] else { panic!("one device, {reports}") };
    assert_eq!((&report["device"]["backend"], &report["gatefold"]), (&"native".into(), &env!("CARGO_PKG_VERSION").into()));
    let tests = report["tests"].as_array().unwrap();
    let count = |verdict: &str| tests.iter().filter(|test| test["verdict"] == verdict).count();
    let [passed, ignored] = ["passed", "ignored"].map(count);
    assert!(passed > 30 && ignored > 0 && passed + ignored == tests.len(), "{passed} passed, {ignored} ignored");
    assert!(out.ends_with(&format!("\n{ignored} not for this device\n{passed} passed, 0 failed\n")), "{out}");
    assert!(text.contains(&format!("{passed} passed, 0 failed, {ignored} not for this device.")), "{text}");
    // The kernels of matrix units did not run, and are named.
    let matrices = tests.iter().find(|test| test["test"] == "gemm_cooperative_8").unwrap();
    assert_eq!((&matrices["verdict"], &matrices["cases"]), (&"ignored".into(), &0.into()));
    let tensor = |test: &str, tensor: &str| {
        let tensors = tests.iter().filter(|found| found["test"] == test).flat_map(|found| found["tensors"].as_array().unwrap());
        tensors.filter(|found| found["tensor"] == tensor).collect::<Vec<_>>()
    };
    let [c] = tensor("gemm", "c")[..] else { panic!("no c of gemm in {report}") };
    let number = |name: &str| c[name].as_f64().unwrap();
    // A unit in the last place is between 2^-24 and 2^-23 of a scale.
    let units = number("ulps_of_scale") / number("relative");
    assert!(number("comparisons") > 100.0 && number("relative") > 1e-8 && number("relative") < 2e-6, "{c}");
    assert!((2f64.powi(22)..2f64.powi(25)).contains(&units), "{c}");
    let tanh = tensor("math", "tanh");
    assert!(tanh.len() == 1 && (0.5..1.5).contains(&tanh[0]["ulps"].as_f64().unwrap()), "{tanh:?}");
    assert!(text.contains("| gemm | c | "), "{text}");
}

/// The JSON lines of a run that succeeds.
#[track_caller]
fn lines(args: &[&str], environment: &[(&str, &str)]) -> Vec<Value> {
    let ran = gatefold(&[args, &["--json"]].concat(), environment);
    expect(&ran, 0, "");
    ran.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn bench_prints_lines_of_the_common_schema() {
    let shapes = ["--shape", "3,2,4,5", "--shape", "1,1,1,1"];
    let lines =
        lines(&[&["bench", "--device", "cpu", "--cell", "gru,rnn"], &shapes[..]].concat(), &[("BENCH_MODES", "step,train")]);
    let found: Vec<_> =
        lines.iter().map(|line| [&line["cell"], &line["T"], &line["H"], &line["mode"]].map(Value::to_string)).collect();
    let cells = ["gru", "rnn"].iter().flat_map(|cell| [(cell, 3, 5), (cell, 1, 1)]);
    let expected = cells.flat_map(|(cell, t, h)| {
        ["train", "step"].map(|mode| [format!("{cell:?}"), t.to_string(), h.to_string(), format!("{mode:?}")])
    });
    assert_eq!(found, expected.collect::<Vec<_>>());
    for line in &lines {
        assert_eq!((&line["peer"], &line["layers"]), (&"gatefold".into(), &1.into()), "{line}");
        assert!(line["device"].as_str().unwrap().starts_with("cpu"), "{line}");
        assert!(line["B"].is_u64() && line["I"].is_u64() && line["runs"].as_u64().unwrap() >= 5, "{line}");
        let [median, min, first] = ["ms_median", "ms_min", "first_ms"].map(|field| line[field].as_f64().unwrap());
        assert!(0.0 < min && min <= median && first > 0.0, "{line}");
        assert!(line["other_cpu"].is_f64() || !cfg!(target_os = "linux"), "{line}");
        assert!(line["peak_bytes"].as_u64().unwrap() > 0 && line["host_ms"].is_null(), "{line}");
    }

    let half = self::lines(
        &["bench", "--device", "cpu", "--precision", "half", "--shape", "3,2,4,5"],
        &[("BENCH_MODES", "infer,train,step")],
    );
    assert!(half.iter().all(|line| line["precision"] == "half") && half.len() == 3, "{half:?}");
    assert!(lines.iter().all(|line| line["precision"] == "single"), "{lines:?}");

    let table = gatefold(&["bench", "--device", "cpu", "--shape", "3,2,4,5", "--mode", "train"], &[]);
    expect(&table, 0, "GFLOP/s");
    assert!(table.out.contains("train") && !table.out.contains("infer"), "{}", table.out);
    let two = gatefold(&["bench", "--device", "cpu", "--json", "--mode", "infer"], &[("BENCH_ONLY", "_1_128,lstm_100_32_128")]);
    assert_eq!(two.out.lines().count(), 2, "{}", two.out);
}

#[test]
fn bench_counts_memory_by_steps_and_layers() {
    let peak = |shape: &str, layers: &str| {
        let line = lines(&["bench", "--device", "cpu", "--mode", "train", "--shape", shape, "--layers", layers], &[]).remove(0);
        line["peak_bytes"].as_f64().unwrap()
    };
    let [short, long, deep] = [peak("16,8,16,16", "1"), peak("64,8,16,16", "1"), peak("64,8,16,16", "3")];
    assert!(2.5 * short < long && long < 4.5 * short, "four times the steps: {short} and {long} bytes");
    assert!(1.5 * long < deep && deep < 4.0 * long, "three layers: {long} and {deep} bytes");
}

/// The best adapter of the machine, hardware or software.
fn adapter() -> String {
    let adapter = gatefold::Device::list().into_iter().find(|info| info.backend != "native");
    let info = adapter.expect("this test needs a wgpu adapter and found none: apt-get install mesa-vulkan-drivers");
    format!("{}:{}", info.backend, info.name)
}

#[test]
fn bench_times_kernels_against_the_peaks_of_the_device() {
    for device in ["cpu", &adapter()] {
        let lines = lines(&["bench", "--kernels", "--device", device, "--cell", "gru", "--shape", "3,2,4,5"], &[]);
        let number = |line: &Value, name: &str| line[name].as_f64().unwrap();
        let [peak, kernels @ ..] = &lines[..] else { panic!("no line") };
        assert_eq!(peak["mode"], "peak", "{peak}");
        let (copy, multiply_add) = (number(peak, "copy_gb_per_s"), number(peak, "multiply_add_gflops"));
        assert!(copy > 0.1 && multiply_add > 0.1, "{peak}");
        let names: Vec<&str> = kernels.iter().map(|line| line["kernel"].as_str().unwrap()).collect();
        for wanted in ["product x.W_ih^T", "product dg^T.h", "column sum", "adamw", "sweep forward", "sweep backward"] {
            assert!(names.contains(&wanted), "{device}: no {wanted} in {names:?}");
        }
        for line in kernels {
            assert_eq!((&line["mode"], &line["cell"], &line["H"]), (&"kernel".into(), &"gru".into(), &5.into()), "{line}");
            // What takes longest of the two, arithmetic or memory.
            let least = (number(line, "gflops") / multiply_add).max(number(line, "gb_per_s") / copy);
            assert!((number(line, "of_roof") - least).abs() <= 1e-6 * least && least > 0.0, "{line}");
        }
        // A recurrent product: 3 gates, 3 steps, 2 rows, 5 units by 5.
        let sweep = kernels.iter().find(|line| line["kernel"] == "sweep forward").unwrap();
        let flops = number(sweep, "gflops") * number(sweep, "ms_median") * 1e6;
        assert!((flops - 2.0 * f64::from(3 * 3 * 2 * 5 * 5)).abs() < 1e-6 * flops, "{sweep}");
    }
}

#[test]
fn bench_profiles_a_training_step() {
    let lines = lines(&["bench", "--profile", "--device", &adapter(), "--shape", "3,2,4,5"], &[]);
    let launches = |part: &str| -> u64 {
        let found = lines.iter().filter(|line| line["kernel"].as_str().unwrap().contains(part));
        found.map(|line| line["launches"].as_u64().unwrap()).sum()
    };
    assert!(launches("lstm") > 0 && launches("column_sum") == 2, "{lines:?}");
    assert!(
        lines.iter().all(|line| line["ms"].as_f64().unwrap() >= 0.0) && lines.iter().any(|line| line["ms"] != 0.0),
        "{lines:?}"
    );
    let refused = gatefold(&["bench", "--profile", "--device", "cpu", "--shape", "3,2,4,5"], &[]);
    expect(&refused, 1, "device.profile: the native CPU has no clock of kernels");
}

#[test]
fn bench_tells_what_a_start_takes() {
    let lines = lines(&["bench", "--startup", "--device", "cpu", "--cell", "lstm,rnn"], &[]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    for line in &lines {
        let ms = |name: &str| line[name].as_f64().unwrap();
        let sum = ms("open_ms") + ms("build_ms") + ms("infer_ms") + ms("train_ms");
        assert!((ms("startup_ms") - sum).abs() < 1e-9 && ms("train_again_ms") > 0.0, "{line}");
    }
    expect(&gatefold(&["bench", "--startup", "--device", "cpu"], &[]), 0, "together");
}

#[test]
fn bench_says_which_kernels_run_and_why() {
    let device = adapter();
    let explain =
        |more: &[&str]| lines(&[&["bench", "--explain", "--device", &device, "--shape", "6,2,4,8"], more].concat(), &[]);
    let sweep = |lines: &[Value]| lines.iter().find(|line| line["table"] == "sweep").unwrap().clone();
    let (by_table, by_override) = (explain(&[]), explain(&["--sweep", "step", "--product-kernel", "general"]));
    // 8 units stay in the registers of any device.
    let line = sweep(&by_table);
    assert_eq!((&line["kernel"], &line["mode"], &line["H"]), (&"resident".into(), &"explain".into(), &8.into()), "{line}");
    assert!(line["row"].as_str().unwrap().contains("T 5.., H "), "{line}");
    assert!(!by_table.iter().any(|line| line["table"] == "step"), "{by_table:?}");
    let line = sweep(&by_override);
    assert_eq!((&line["kernel"], &line["reason"]), (&"step".into(), &"Device::override_kernels".into()), "{line}");
    assert!(by_override.iter().any(|line| line["table"] == "step"), "{by_override:?}");
    let mut products = by_override.iter().filter(|line| line["table"] == "product").peekable();
    assert!(products.peek().is_some() && products.all(|line| line["kernel"] == "general"), "{by_override:?}");

    expect(
        &gatefold(&["bench", "--explain", "--device", "cpu", "--shape", "6,2,4,8"], &[]),
        0,
        "lstm_6_2_4_8: nothing to choose",
    );
    let refused = gatefold(&["bench", "--device", "cpu", "--sweep", "resident"], &[]);
    expect(&refused, 1, "device.override_kernels: sweep resident: the native CPU has no kernels to choose from");
    expect(&gatefold(&["bench", "--sweep", "fast"], &[]), 2, "expected one of `scan`, `resident`, `grid`, `step`");
    expect(&gatefold(&["bench", "--tune", "--device", "cpu"], &[]), 1, "has no kernels to choose from");
}

#[test]
fn bench_tunes_the_step() {
    for (table, general, works) in [("step", "general", 10), ("pair", "apart", 6)] {
        let lines = lines(&["bench", "--tune", "--device", &adapter()], &[("BENCH_ONLY", table), ("BENCH_MIN_RUNS", "1")]);
        let of_general: Vec<&Value> = lines.iter().filter(|line| line["kernel"] == general).collect();
        assert_eq!(of_general.len(), works, "{lines:?}");
        assert!(of_general.iter().all(|line| line["gain"] == 1.0 && line["table"] == table), "{lines:?}");
        let rows: Vec<&str> = lines.iter().filter_map(|line| line["row"].as_str()).collect();
        assert!(rows.len() <= works && rows.iter().all(|row| row.starts_with("Row { classes: &[Class::")), "{rows:?}");
    }
}

#[test]
fn bench_checks_its_answers_before_it_times() {
    let folder = tempfile::tempdir().unwrap();
    // Weights of zero give an output of zero. T, B, I, H = 3, 2, 4, 5; gates and states of each cell.
    for (cell, gates, states) in [("lstm", 4, 2), ("gru", 3, 1), ("rnn", 1, 1)] {
        let (x, y, state, params) = (3 * 2 * 4, 3 * 2 * 5, states * 2 * 5, gates * 5 * (4 + 5 + 2));
        let file = folder.path().join(format!("{cell}_3_2_4_5.bin"));
        let run = |numbers: &[f32], modes: &str| {
            std::fs::write(&file, bytemuck::cast_slice(numbers)).unwrap();
            let environment = [("BENCH_REF", folder.path().to_str().unwrap()), ("BENCH_MODES", modes)];
            gatefold(&["bench", "--device", "cpu", "--cell", cell, "--shape", "3,2,4,5", "--json"], &environment)
        };
        let mut numbers = vec![0.0; 2 * (x + params + y) + state];
        let checked = run(&numbers, "infer,train,step");
        expect(&checked, 0, r#""mode":"check""#);
        assert_eq!(checked.out.lines().count(), 6, "{}", checked.out);
        *numbers.last_mut().unwrap() = 1.0;
        let wrong = run(&numbers, "infer,train");
        expect(&wrong, 1, &format!("{cell}_3_2_4_5 train: db_hh is off its reference by 1.0e0: not timed"));
        assert_eq!(wrong.out.lines().count(), 3, "{}", wrong.out);
        let bytes = 4 * numbers.len();
        expect(&run(&numbers[1..], "infer"), 1, &format!("{cell}_3_2_4_5.bin has {} bytes, expected {bytes}", bytes - 4));
        // The last number of y is the last step's.
        *numbers.last_mut().unwrap() = 0.0;
        numbers[x + params + 2 * y - 1] = 1.0;
        expect(&run(&numbers, "step"), 1, "step: y is off its reference by 1.0e0: not timed");
    }
}

#[test]
fn wrong_arguments_are_told() {
    expect(&gatefold(&[], &[]), 2, "Usage");
    expect(&gatefold(&["train"], &[]), 2, "unrecognized subcommand 'train'");
    expect(&gatefold(&["bench", "--cell", "lstm,elman"], &[]), 2, "possible values: lstm, gru, rnn");
    expect(&gatefold(&["bench", "--layers", "0"], &[]), 2, "0 is not in 1..");
    expect(&gatefold(&["bench", "--kernels", "--mode", "train"], &[]), 2, "cannot be used with");
    expect(&gatefold(&["bench", "--shape", "3,2,4"], &[]), 2, "expected 4 numbers T,B,I,H from 1");
    expect(&gatefold(&["bench", "--shape", "0,2,4,5"], &[]), 2, "expected 4 numbers T,B,I,H from 1");
    expect(&gatefold(&["bench", "--mode", "both"], &[]), 2, "possible values: infer, train, step");
    expect(&gatefold(&["verify", "--tolerance", "1e-5,NaN"], &[]), 2, "expected 2 numbers OUT,GRAD from 0");
    let absent = gatefold(&["verify", "--cases", "absent"], &[]);
    expect(&absent, 1, "absent: ");
    assert_eq!(absent.err.matches("os error").count(), 1, "{}", absent.err);
    expect(&gatefold(&["bench"], &[("BENCH_BUDGET", "long")]), 1, "BENCH_BUDGET is \"long\", expected a number from 0");
    let unknown = gatefold(&["bench", "--device", "cpu"], &[("BENCH_MODES", "infer,trian")]);
    expect(&unknown, 1, "BENCH_MODES names \"trian\", expected some of: infer, train, step");
    let unknown = gatefold(&["bench", "--device", "cpu"], &[("BENCH_ONLY", "lstm_7")]);
    expect(&unknown, 1, "BENCH_ONLY names \"lstm_7\", expected some of: lstm_100_1_128_128, ");
    for command in ["verify", "bench"] {
        let unknown = gatefold(&[command, "--device", "nonesuch"], &[]);
        expect(&unknown, 1, "no device is named \"nonesuch\", expected one of: cpu");
        expect(&gatefold(&[command], &[("GATEFOLD_DEVICE", "nonesuch")]), 1, "the default device: device: no device is named");
    }
}
