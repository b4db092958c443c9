//! Checkpoints: adapters in PEFT's files, training state in a file beside them, and the allocator's state as bytes.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`tensors`] | files of named tensors, in the format of safetensors |
//! | [`config`] | `adapter_config.json` |
//! | [`adapters`] | triplets in such a file: cut by the rank pattern, and restored to their places |
//! | [`lora`] | the same adapters as plain LoRA |
//! | [`replace`] | files that are replaced together |
//! | [`state`] | the allocator's state as bytes |
//!
//! Files are not trusted: what is allocated for one is bounded by its size, and no name in it becomes a path.

pub mod adapters;
pub mod config;
pub mod lora;
pub mod replace;
pub mod state;
pub mod tensors;

use crate::error::{At, Code, Error, Result, reserve};
use adapters::{Found, Source};
use config::Config;
use replace::Replacement;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tensors::{Content, Entry, TensorFile};

/// The adapter's configuration.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
/// The adapter's tensors.
pub(crate) const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// What training needs beside them.
pub(crate) const STATE_FILE: &str = "training_state.safetensors";

/// What PEFT notes in its files of tensors.
const FORMAT: (&str, &str) = ("format", "pt");
/// Where the state's text stands.
const STATE_TEXT: &str = "training_state";

/// What is to be written.
pub struct Save<'a> {
    /// Where; made if it is not there.
    pub folder: PathBuf,
    /// JSON; `None` leaves the adapter's files alone.
    pub config: Option<&'a str>,
    /// The adapters.
    pub adapters: Vec<Source<'a>>,
    /// What was trained beside them.
    pub tensors: Vec<Entry<'a>>,
    /// Text and tensors; `None` leaves the file of the training state alone.
    pub state: Option<(&'a str, Vec<Entry<'a>>)>,
}

/// Writes a checkpoint: every file of it, or none.
pub fn save(save: Save<'_>) -> Result<()> {
    let adapter = match save.config {
        Some(text) => Some(adapter_files(text, &save.adapters, save.tensors)?),
        None if save.adapters.is_empty() && save.tensors.is_empty() => None,
        None => return Err(Error::argument("desc.config", "NULL", "a text, since there are adapters or tensors")),
    };
    let state = save.state.map(|(text, mut entries)| {
        let header = tensors::header(&mut entries, (STATE_TEXT, text), "state_tensors")?;
        Ok::<_, Error>((header, entries))
    });
    let state = state.transpose()?;
    if adapter.is_none() && state.is_none() {
        return Err(Error::argument("desc.config", "NULL, as desc.state is", "at least one of them"));
    }
    let mut files = Replacement::new(&save.folder)?;
    if let Some((header, entries)) = &state {
        files.stage(STATE_FILE, |file| tensors::write(file, header, entries))?;
    }
    if let Some((config, header, entries)) = &adapter {
        files.stage(ADAPTER_FILE, |file| tensors::write(file, header, entries))?;
        files.stage(CONFIG_FILE, |file| file.write_all(config.as_bytes()))?;
    }
    files.commit()
}

type AdapterFiles<'a> = (String, Vec<u8>, Vec<Entry<'a>>);

fn adapter_files<'a>(text: &str, adapters: &'a [Source<'_>], beside: Vec<Entry<'a>>) -> Result<AdapterFiles<'a>> {
    let config = config::for_adapters(text, adapters)?;
    let mut entries = reserve(3 * adapters.len() + beside.len(), "tensors")?;
    for (i, adapter) in adapters.iter().enumerate() {
        entries.extend(adapter.entries().at_index("adapters", i)?);
    }
    for (i, entry) in beside.into_iter().enumerate() {
        if adapters::path_of(&entry.name).is_some() {
            let name = format!("tensors[{i}].name");
            return Err(Error::argument(name, format_args!("{:?}", entry.name), "another: it is one of an adapter's"));
        }
        entries.push(entry);
    }
    let header = tensors::header(&mut entries, FORMAT, "tensors")?;
    Ok((config, header, entries))
}

/// Writes adapters as plain LoRA.
pub fn export_lora(save: Save<'_>) -> Result<()> {
    if save.state.is_some() {
        return Err(Error::argument("desc.state", "a text", "NULL: plain LoRA has no training state"));
    }
    let text = save.config.ok_or_else(|| Error::argument("desc.config", "NULL", "a text"))?;
    let plain = lora::Lora::new(text, &save.adapters)?;
    let mut entries = plain.entries()?;
    entries.extend(save.tensors);
    let header = tensors::header(&mut entries, FORMAT, "tensors")?;
    let mut files = Replacement::new(&save.folder)?;
    files.stage(ADAPTER_FILE, |file| tensors::write(file, &header, &entries))?;
    files.stage(CONFIG_FILE, |file| file.write_all(plain.config.as_bytes()))?;
    files.commit()
}

/// An adapter's files, opened and checked.
pub struct AdapterPart {
    /// The configuration as it stands in the file.
    pub config: String,
    /// The adapters, in the order of their names.
    pub adapters: Vec<Found>,
    /// Positions in the file of the tensors that belong to no adapter.
    pub beside: Vec<usize>,
    /// The tensors.
    pub file: TensorFile,
}

/// A checkpoint that was opened: the files that were asked for.
pub struct Checkpoint {
    adapter: Option<AdapterPart>,
    state: Option<TensorFile>,
}

impl Checkpoint {
    /// Opens files of a folder.
    pub fn open(folder: &Path, adapter: bool, state: bool) -> Result<Self> {
        Ok(Self {
            adapter: adapter.then(|| AdapterPart::open(folder)).transpose()?,
            state: state.then(|| TensorFile::open(&folder.join(STATE_FILE))).transpose()?,
        })
    }

    /// The adapter's part.
    pub fn adapter(&self) -> Result<&AdapterPart> {
        self.adapter.as_ref().ok_or_else(|| not_opened("ADALORA_FILES_ADAPTER"))
    }

    /// The training state.
    pub fn state(&self) -> Result<&TensorFile> {
        self.state.as_ref().ok_or_else(|| not_opened("ADALORA_FILES_STATE"))
    }

    /// The training state's text.
    pub fn state_text(&self) -> Result<&str> {
        let state = self.state()?;
        state
            .metadata(STATE_TEXT)
            .filter(|text| !text.contains('\0'))
            .ok_or_else(|| state.corrupt(format_args!("no text {STATE_TEXT:?}"), "what adalora_checkpoint_write wrote"))
    }
}

fn not_opened(what: &str) -> Error {
    Error::new(Code::InvalidState, format!("checkpoint: found one that was opened without {what}, expected it with"))
}

impl AdapterPart {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let text = config::read(&path)?;
        let config = Config::parse(&text, &path)?;
        let file = TensorFile::open(&folder.join(ADAPTER_FILE))?;
        // The configuration goes before other tensors come, and comes back after them: if it is the same now, the
        // tensors that were opened in between are its own.
        if config::read(&path)? != text {
            return Err(corrupt(&path, "another text than a moment ago", "one that nobody replaces while it is read"));
        }
        let (adapters, beside) = adapters::find(&file, config, &path)?;
        Ok(Self { config: text, adapters, beside, file })
    }
}

/// A file that is there and is a file: what waits for a writer, or never ends, is refused.
fn open_file(path: &Path) -> Result<(File, u64)> {
    let failed = |e| failed(path, "opening", &e);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::new(Code::Io, format!("{}: found what is no file, expected one", path.display())));
    }
    Ok((file, metadata.len()))
}

/// All bytes of a file that may hold no more than `most`.
fn read_whole(path: &Path, most: usize) -> Result<Vec<u8>> {
    let (file, size) = open_file(path)?;
    if size > most as u64 {
        return Err(corrupt(path, format_args!("{size} bytes"), format_args!("at most {most}")));
    }
    let mut bytes = reserve(size as usize, "bytes")?;
    bytes.resize(size as usize, 0);
    file.read_exact_at(&mut bytes, 0).map_err(|e| failed(path, "reading", &e))?;
    Ok(bytes)
}

/// What the operating system would not do.
fn failed(path: &Path, action: &str, error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::OutOfMemory => Code::OutOfMemory,
        _ => Code::Io,
    };
    Error::new(code, format!("{}: {action} it failed: {error}", path.display()))
}

/// A file that is damaged.
fn corrupt(path: &Path, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::new(Code::CorruptData, format!("{}: found {found}, expected {expected}", path.display()))
}

/// A file that is whole, and holds what does not fit.
fn misfit(path: &Path, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::argument(path.display(), found, expected)
}

/// Bytes of the caller's, as a tensor's content.
pub fn borrowed(bytes: &[u8]) -> Content<'_> {
    Box::new(move |to: &mut dyn Write| to.write_all(bytes))
}
