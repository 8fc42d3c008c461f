//! The one error type: what was asked, of which argument, what was expected and what was given.

use std::fmt;

/// What went wrong, for code that wants to react to it. The text is in [`Error`]'s `Display`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument has a wrong shape, type or value.
    Argument,
    /// Two arguments live on different devices.
    DeviceMismatch,
    /// No such device, or it could not be opened.
    NoDevice,
    /// The device's limits are too small for the request.
    Limit,
    /// The device has no memory left for the request.
    OutOfMemory,
    /// The device was lost or reported an internal error; nothing on it can be trusted any more.
    DeviceLost,
    /// A combination of options that is not built.
    Unsupported,
    /// A file could not be read or written.
    Io,
    /// A file was read, but its content is not what was expected.
    Format,
}

/// A failed operation. `Display` names the operation, the argument, what was expected and what was given:
/// `lstm.forward: x has shape [20, 8, 27], expected [seq, batch, 28]`.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` with the text `message`.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { inner: Box::new(Inner { kind, message: message.into(), source: None }) }
    }

    /// `{op}: {argument} has shape {given:?}, expected {expected}`.
    pub(crate) fn shape(op: &str, argument: &str, given: &[usize], expected: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Argument, format!("{op}: {argument} has shape {given:?}, expected {expected}"))
    }

    /// `{op}: {argument} is {given}, expected {expected}`.
    pub(crate) fn argument(op: &str, argument: &str, given: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Argument, format!("{op}: {argument} is {given}, expected {expected}"))
    }

    /// `{op}: {what}` for a combination that is refused by name.
    pub(crate) fn unsupported(op: &str, what: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Unsupported, format!("{op}: {what}"))
    }

    /// `{op}: {path}: {source}` for a file that could not be read or written.
    pub(crate) fn io(op: &str, path: &std::path::Path, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, format!("{op}: {}: {source}", path.display())).with_source(source)
    }

    /// `{op}: {what}` for a file whose content is not what was expected.
    pub(crate) fn format(op: &str, what: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Format, format!("{op}: {what}"))
    }

    /// The same error with the one that caused it, whose text the message holds already.
    pub(crate) fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.inner.source = Some(Box::new(source));
        self
    }

    /// What went wrong, for code that wants to react to it.
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.inner.kind, self.inner.message)
    }
}

impl std::error::Error for Error {
    /// What lies behind the cause: the cause itself is in the message, and reports that follow sources would repeat it.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().and_then(std::error::Error::source)
    }
}
