//! Checkpoints: safetensors files, with weights under PyTorch's names and texts beside them.
//!
//! A file is written under another name in the same folder, flushed, and renamed: it is whole or absent.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::tensor::Tensor;

/// Texts beside the tensors: a vocabulary, a normaliser, where the data came from.
pub type Metadata = BTreeMap<String, String>;

/// A tensor of a file, as words of 32 bits.
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Entry {
    pub fn of_tensor(name: String, tensor: &Tensor) -> Result<Self> {
        let bytes = bytemuck::cast_slice(&tensor.read_back::<u32>()?).to_vec();
        Ok(Self { name, dtype: Dtype::F32, shape: tensor.shape().to_vec(), bytes })
    }

    pub fn of_words(name: &str, words: &[u32]) -> Self {
        Self { name: name.to_owned(), dtype: Dtype::U32, shape: vec![words.len()], bytes: bytemuck::cast_slice(words).to_vec() }
    }
}

/// Writes a file of `entries`, whole or not at all.
pub(crate) fn write(op: &str, path: &Path, entries: &[Entry], metadata: &Metadata) -> Result<()> {
    let views = entries
        .iter()
        .map(|entry| Ok((entry.name.as_str(), TensorView::new(entry.dtype, entry.shape.clone(), &entry.bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| Error::format(op, &error).with_source(error))?;
    let metadata: HashMap<String, String> = metadata.clone().into_iter().collect();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| Error::format(op, &error).with_source(error))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |error: std::io::Error| Error::io(op, path, error);
    #[cfg_attr(not(unix), expect(unused_mut, reason = "only Unix has permissions to set"))]
    let mut builder = tempfile::Builder::new();
    // A checkpoint is no secret: like any other new file, whom it is open to is the umask's matter.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).map_err(failed)?;
    file.write_all(&bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// A file's tensors by name, and its texts.
pub(crate) struct File {
    pub entries: BTreeMap<String, Entry>,
    pub metadata: Metadata,
}

pub(crate) fn read(op: &str, path: &Path) -> Result<File> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(op, path, error))?;
    let failed = |error| Error::format(op, format!("{}: not a safetensors file: {error}", path.display())).with_source(error);
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(failed)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(failed)?;
    let entry = |(name, view): (String, TensorView<'_>)| {
        let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (name.clone(), Entry { name, dtype, shape, bytes })
    };
    let entries = tensors.tensors().into_iter().map(entry).collect();
    let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    Ok(File { entries, metadata })
}

impl File {
    /// The same tensors under the names that `name_of` gives them, without those to which it gives none.
    fn rename(self, op: &str, path: &Path, name_of: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut entries = BTreeMap::<String, Entry>::new();
        for (name, entry) in self.entries {
            let Some(meant) = name_of(&name) else { continue };
            if let Some(first) = entries.get(&meant) {
                let what = format!("{}: {} and {name} are both meant for {meant}", path.display(), first.name);
                return Err(Error::format(op, what));
            }
            entries.insert(meant, entry);
        }
        Ok(Self { entries, ..self })
    }

    /// Takes the tensors named and shaped as `wanted`, all or none. Every one that is missing, has another shape or type,
    /// or that nobody wants is named in the error.
    pub fn take(mut self, op: &str, path: &Path, wanted: &[(String, Vec<usize>)]) -> Result<Vec<Vec<f32>>> {
        let (mut values, mut wrong) = (Vec::new(), Vec::new());
        for (name, shape) in wanted {
            match self.entries.remove(name) {
                None => wrong.push(format!("{name} is missing")),
                Some(entry) if entry.shape != *shape => {
                    wrong.push(format!("{name} has shape {:?}, expected {shape:?}", entry.shape));
                }
                Some(entry) => match numbers(&entry) {
                    Some(numbers) => values.push(numbers),
                    None => wrong.push(format!("{name} has type {:?}, expected F32, F16 or BF16", entry.dtype)),
                },
            }
        }
        wrong.extend(self.entries.keys().map(|name| format!("{name} is unexpected")));
        if wrong.is_empty() { Ok(values) } else { Err(Error::format(op, format!("{}: {}", path.display(), wrong.join("; ")))) }
    }
}

/// The values as f32. Bytes are little-endian, at any alignment.
fn numbers(entry: &Entry) -> Option<Vec<f32>> {
    let pairs = entry.bytes.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    match entry.dtype {
        Dtype::F32 => Some(words(entry).into_iter().map(f32::from_bits).collect()),
        Dtype::F16 => Some(pairs.map(|bits| half::f16::from_bits(bits).to_f32()).collect()),
        Dtype::BF16 => Some(pairs.map(|bits| half::bf16::from_bits(bits).to_f32()).collect()),
        _ => None,
    }
}

/// The values as 32-bit words.
pub(crate) fn words(entry: &Entry) -> Vec<u32> {
    entry.bytes.chunks_exact(4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()
}

pub(crate) fn write_params(path: &Path, params: &[(String, &Param)], metadata: &Metadata) -> Result<()> {
    let entries = params.iter().map(|(name, param)| Entry::of_tensor(name.clone(), param.value())).collect::<Result<Vec<_>>>()?;
    write("Module.save", path, &entries, metadata)
}

pub(crate) fn read_params(
    op: &str,
    path: &Path,
    params: &[(String, &Param)],
    name_of: impl Fn(&str) -> Option<String>,
) -> Result<Metadata> {
    let file = read(op, path)?.rename(op, path, name_of)?;
    let metadata = file.metadata.clone();
    let wanted: Vec<_> = params.iter().map(|(name, param)| (name.clone(), param.value().shape().to_vec())).collect();
    for ((_, param), values) in params.iter().zip(file.take(op, path, &wanted)?) {
        param.set(&values)?;
    }
    Ok(metadata)
}

/// The text that says how many tensors each layer has in a file of states.
const STATE: &str = "gatefold.state";

/// Writes the states of layers, `1.0`, `1.1`, .. being those of layer 1.
pub(crate) fn write_state(path: &Path, layers: &[Vec<Tensor>]) -> Result<()> {
    let mut entries = Vec::new();
    for (layer, tensors) in layers.iter().enumerate() {
        for (index, tensor) in tensors.iter().enumerate() {
            entries.push(Entry::of_tensor(format!("{layer}.{index}"), tensor)?);
        }
    }
    let counts: Vec<usize> = layers.iter().map(Vec::len).collect();
    let metadata = Metadata::from([(STATE.to_owned(), serde_json::json!(counts).to_string())]);
    write("State.save", path, &entries, &metadata)
}

pub(crate) fn read_state(device: &Device, path: &Path) -> Result<Vec<Vec<Tensor>>> {
    let op = "State.load";
    let file = read(op, path)?;
    let wrong = |what: String| Error::format(op, format!("{}: {what}", path.display()));
    let text = file.metadata.get(STATE).ok_or_else(|| wrong(format!("{STATE} is missing: not a state's file")))?;
    let counts: Vec<usize> =
        serde_json::from_str(text).map_err(|error| wrong(format!("{STATE} is {text}: {error}")).with_source(error))?;
    let given = file.entries.len();
    // Before as many names are made.
    if counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count)) != Some(given) {
        return Err(wrong(format!("{STATE} is {text}, expected as many tensors as there are: {given}")));
    }
    let names = counts.iter().enumerate().flat_map(|(layer, count)| (0..*count).map(move |index| format!("{layer}.{index}")));
    let with_shape = |name: String| {
        let shape = file.entries.get(&name).map_or(Vec::new(), |entry| entry.shape.clone());
        (name, shape)
    };
    let wanted: Vec<_> = names.map(with_shape).collect();
    let mut values = file.take(op, path, &wanted)?.into_iter().zip(wanted);
    let mut upload = |count: usize| -> Result<Vec<Tensor>> {
        values.by_ref().take(count).map(|(values, (_, shape))| Tensor::upload(op, device, &values, shape)).collect()
    };
    counts.into_iter().map(&mut upload).collect()
}

/// The texts of a checkpoint, without its tensors: to read a vocabulary before the model is built.
///
/// # Errors
/// [`crate::ErrorKind::Io`], [`crate::ErrorKind::Format`].
pub fn read_metadata(path: impl AsRef<Path>) -> Result<Metadata> {
    Ok(read("read_metadata", path.as_ref())?.metadata)
}
