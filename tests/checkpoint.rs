//! Files: PyTorch's are read, ours are whole, and nothing is lost on the way.

mod common;

use std::path::Path;

use anyhow::{Result, ensure};
use common::devices;
use gatefold::checkpoint::{self, Metadata};
use gatefold::data::Vocabulary;
use gatefold::nn::{Direction, Dropout, EmbeddingConfig, LinearConfig, Lstm, LstmConfig, Module, Sequential, State};
use gatefold::optim::AdamW;
use gatefold::verify::{Comparison, case_file};
use gatefold::{CrossEntropy, Device, Ids, Rng, Tensor, Trainer};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn lstm(device: &Device, seed: u64) -> Result<Lstm> {
    Ok(LstmConfig::new(3, 5).layers(2).direction(Direction::Both).init(device, &mut Rng::seed(seed))?)
}

fn model(device: &Device, seed: u64) -> Result<Sequential> {
    let mut rng = Rng::seed(seed);
    Ok(Sequential::new()
        .push(EmbeddingConfig::new(9, 3).init(device, &mut rng)?)
        .push(lstm(device, seed)?)
        .push(Dropout::new(0.5)?)
        .push(LinearConfig::new(10, 9).init(device, &mut rng)?))
}

fn bits(module: &impl Module) -> Result<Vec<u32>> {
    let parts = module.params().iter().map(|(_, param)| param.value().to_vec()).collect::<Result<Vec<_>, _>>()?;
    Ok(parts.concat().iter().map(|value| value.to_bits()).collect())
}

/// Fails unless the layer answers as PyTorch's did, within `bound` of each tensor's largest magnitude.
fn answers_as_pytorch(device: &Device, lstm: &Lstm, bound: f64) -> Result<()> {
    let expected = case_file::read_tensors(format!("{FIXTURES}/torch_lstm_expected.safetensors"))?;
    let x = Tensor::from_slice(device, &expected["x"].to_f32(), expected["x"].shape.clone())?;
    let (y, state) = lstm.forward(&x, None)?;
    for (name, tensor) in [("y", y), ("hn", state.h), ("cn", state.c)] {
        ensure!(tensor.shape() == expected[name].shape, "{device:?}: {name} has shape {:?}", tensor.shape());
        let comparison = Comparison::new(name, &tensor.to_vec()?, &expected[name].values, bound);
        ensure!(comparison.passes(), "{device:?}: {comparison:?}");
    }
    Ok(())
}

#[test]
fn a_pytorch_state_dict_loads_as_it_is() -> Result<()> {
    for device in devices()? {
        let lstm = lstm(&device, 1)?;
        assert!(answers_as_pytorch(&device, &lstm, 1e-2).is_err(), "the file must matter");
        lstm.load(format!("{FIXTURES}/torch_lstm_state_dict.safetensors"))?;
        answers_as_pytorch(&device, &lstm, 1e-6)?;
    }
    Ok(())
}

/// The state_dict again, every value in another type.
fn narrow(dtype: Dtype, bits: fn(f32) -> u16, to: &Path) -> Result<()> {
    let bytes = std::fs::read(format!("{FIXTURES}/torch_lstm_state_dict.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let parts: Vec<(&str, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| {
            let numbers = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            (name, view.shape().to_vec(), numbers.flat_map(|number| bits(number).to_le_bytes()).collect())
        })
        .collect();
    let views = parts.iter().map(|(name, shape, bytes)| Ok((*name, TensorView::new(dtype, shape.clone(), bytes)?)));
    std::fs::write(to, safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?)?;
    Ok(())
}

#[test]
fn half_precision_files_load() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("narrow.safetensors");
    let device = Device::cpu();
    let exact = lstm(&device, 1)?;
    exact.load(format!("{FIXTURES}/torch_lstm_state_dict.safetensors"))?;
    type Case = (Dtype, fn(f32) -> u16, fn(u16) -> f32, f64);
    let cases: [Case; 2] = [
        (Dtype::F16, |v| half::f16::from_f32(v).to_bits(), |b| half::f16::from_bits(b).to_f32(), 2e-3),
        (Dtype::BF16, |v| half::bf16::from_f32(v).to_bits(), |b| half::bf16::from_bits(b).to_f32(), 2e-2),
    ];
    for (dtype, narrowed, widened, bound) in cases {
        narrow(dtype, narrowed, &path)?;
        let lstm = lstm(&device, 2)?;
        lstm.load(&path)?;
        let rounded: Vec<u32> = bits(&exact)?.iter().map(|b| widened(narrowed(f32::from_bits(*b))).to_bits()).collect();
        assert_eq!(bits(&lstm)?, rounded, "{dtype:?}");
        answers_as_pytorch(&device, &lstm, bound)?;
    }
    Ok(())
}

#[test]
fn round_trips_are_exact_and_names_are_pytorchs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let devices = devices()?;
    for (device, other) in devices.iter().zip(devices.iter().cycle().skip(1)) {
        let (saved, loaded) = (model(device, 1)?, model(other, 2)?);
        // Bits that arithmetic would not keep.
        let (_, odd) = &saved.params()[0];
        let mut values = odd.value().to_vec()?;
        values[..6].copy_from_slice(&[-0.0, f32::MIN_POSITIVE / 8.0, f32::MAX, f32::INFINITY, f32::from_bits(0x7fc0_1234), 1.0]);
        odd.set(&values)?;
        saved.save(&path)?;
        assert!(loaded.load(&path)?.is_empty());
        assert_eq!(bits(&saved)?, bits(&loaded)?, "{device:?} to {other:?}");
    }
    let bytes = std::fs::read(&path)?;
    let mut names: Vec<String> = SafeTensors::deserialize(&bytes)?.names().iter().map(|name| name.to_string()).collect();
    names.sort();
    let mut expected = vec!["0.weight".to_owned(), "3.bias".to_owned(), "3.weight".to_owned()];
    for suffix in ["l0", "l0_reverse", "l1", "l1_reverse"] {
        expected.extend(["weight_ih", "weight_hh", "bias_ih", "bias_hh"].map(|kind| format!("1.{kind}_{suffix}")));
    }
    expected.sort();
    assert_eq!(names, expected);
    Ok(())
}

#[test]
fn files_with_other_names_load() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let (device, file) = (Device::cpu(), format!("{FIXTURES}/torch_lstm_state_dict.safetensors"));
    let expected = lstm(&device, 1)?;
    expected.load(&file)?;
    let named = Sequential::new()
        .push_named("encoder", lstm(&device, 2)?)?
        .push(Dropout::new(0.5)?)
        .push_named("head", LinearConfig::new(10, 2).init(&device, &mut Rng::seed(3))?)?;
    let names: Vec<String> = named.params().into_iter().map(|(name, _)| name).collect();
    assert_eq!((names[0].as_str(), names[16].as_str()), ("encoder.weight_ih_l0", "head.weight"));
    named.save(&path)?;
    // Out of a larger file, a part.
    let part = lstm(&device, 4)?;
    part.load_mapped(&path, |name| name.strip_prefix("encoder.").map(str::to_owned))?;
    assert_eq!(bits(&part)?, bits(&lstm(&device, 2)?)?);
    // Under another prefix.
    let encoder = Sequential::new().push_named("encoder", lstm(&device, 5)?)?;
    encoder.load_mapped(&file, |name| Some(format!("encoder.{name}")))?;
    assert_eq!(bits(&encoder)?, bits(&expected)?);
    Ok(())
}

#[test]
fn states_travel_between_devices() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("state.safetensors");
    let devices = devices()?;
    for (device, other) in devices.iter().zip(devices.iter().cycle().skip(1)) {
        let run = |device: &Device, state: Option<&State>| -> Result<(Vec<f32>, State)> {
            let (y, state) = model(device, 1)?.forward(Ids::from_slice(device, &[1, 2, 3, 4, 5, 6], [3, 2])?, state)?;
            Ok((y.to_vec()?, state))
        };
        let (_, state) = run(device, None)?;
        state.save(&path)?;
        let loaded = State::load(other, &path)?;
        for layer in 0..5 {
            let (saved, loaded) = (state.layer(layer), loaded.layer(layer));
            assert_eq!((saved.len(), loaded.len()), if layer == 1 { (2, 2) } else { (0, 0) });
            for (saved, loaded) in saved.iter().zip(loaded) {
                assert_eq!(saved.shape(), loaded.shape());
                let [saved, loaded] = [saved.to_vec()?, loaded.to_vec()?];
                assert!(saved.iter().zip(&loaded).all(|(a, b)| a.to_bits() == b.to_bits()), "{device:?} to {other:?}");
            }
        }
        let (next, there) = (run(device, Some(&state))?.0, run(other, Some(&loaded))?.0);
        let next: Vec<f64> = next.into_iter().map(f64::from).collect();
        let comparison = Comparison::new("y", &there, &next, 1e-5);
        ensure!(comparison.passes(), "{device:?} to {other:?}: {comparison:?}");
    }
    Ok(())
}

#[test]
fn texts_travel_beside_the_weights() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let device = Device::cpu();
    let vocabulary = Vocabulary::chars("größer \"als\" \\ 山\n");
    let mut texts = Metadata::from([("vocabulary".to_owned(), vocabulary.to_json()), ("empty".to_owned(), String::new())]);
    let check = |given: &Metadata| -> Result<()> {
        assert_eq!(*given, texts);
        assert_eq!(Vocabulary::from_json(&given["vocabulary"])?, vocabulary);
        Ok(())
    };
    let path = folder.path().join("model.safetensors");
    let saved = model(&device, 1)?;
    saved.save_with(&path, &texts)?;
    check(&checkpoint::read_metadata(&path)?)?;
    check(&model(&device, 2)?.load(&path)?)?;

    let run = folder.path().join("run.safetensors");
    let trainer = |seed| anyhow::Ok(Trainer::new(model(&device, seed)?, CrossEntropy::new(), AdamW::new(1e-3))?);
    trainer(1)?.save_with(&run, &texts)?;
    // The caller's texts come back without the trainer's own.
    check(&trainer(2)?.load(&run)?)?;
    texts.insert("gatefold.optimizer".to_owned(), "adamw".to_owned());
    texts.insert("gatefold.trainer".to_owned(), r#"{"seed":0,"step":0}"#.to_owned());
    assert_eq!(checkpoint::read_metadata(&run)?, texts);
    Ok(())
}

#[test]
fn a_failed_write_leaves_what_was_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let device = Device::cpu();
    let (old, new) = (lstm(&device, 1)?, lstm(&device, 2)?);
    let path = folder.path().join("model.safetensors");
    old.save(&path)?;
    let bytes = std::fs::read(&path)?;

    // A folder stands where the file should go: the write fails in its last act.
    let taken = folder.path().join("taken");
    std::fs::create_dir(&taken)?;
    std::fs::write(taken.join("inside"), "kept")?;
    assert!(new.save(&taken).is_err());
    assert_eq!(std::fs::read_to_string(taken.join("inside"))?, "kept");
    // And nothing is left lying about.
    let mut names: Vec<_> = std::fs::read_dir(folder.path())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    names.sort();
    assert_eq!(names, ["model.safetensors", "taken"]);
    assert_eq!(std::fs::read(&path)?, bytes);

    // A file is replaced as a whole: who has the old one open goes on reading the old one.
    let mut open = std::fs::File::open(&path)?;
    new.save(&path)?;
    let mut still = Vec::new();
    std::io::Read::read_to_end(&mut open, &mut still)?;
    #[cfg(unix)]
    {
        assert_eq!(still, bytes, "the old file was written into");
        // Whom a new file is open to is the umask's matter, as for any other file.
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "")?;
        let mode = |path: &Path| anyhow::Ok(std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path)?.permissions()));
        assert_eq!(mode(&path)?, mode(&plain)?);
    }
    let check = lstm(&device, 3)?;
    check.load(&path)?;
    assert_eq!(bits(&check)?, bits(&new)?);
    Ok(())
}
