//! What goes wrong, in words: every failure says what was found and what was expected.

use std::fmt::Display;

/// Kind of a failure; each has its own status number in `abi::status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// An argument is wrong.
    InvalidArgument,
    /// A handle is null or of another kind.
    InvalidHandle,
    /// The call does not fit the object's state.
    InvalidState,
    /// Memory of our own could not be had.
    OutOfMemory,
    /// This backend lacks the combination.
    Unsupported,
    /// The backend is not here.
    BackendUnavailable,
    /// Work failed after it had begun.
    Incomplete,
    /// Bytes from outside are damaged.
    CorruptData,
    /// A file is not there.
    NotFound,
    /// The operating system refused to read or write a file.
    Io,
    /// A defect of ours.
    Internal,
}

/// A failure: its kind, and the text that the caller reads.
#[derive(Debug)]
pub struct Error {
    /// Kind.
    pub code: Code,
    /// Text, beginning with the place.
    pub message: String,
}

/// Outcome of everything that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure of this kind.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// A wrong argument: its name, what it held, what it may hold.
    pub fn argument(name: impl Display, found: impl Display, expected: impl Display) -> Self {
        Self::new(Code::InvalidArgument, format!("{name}: found {found}, expected {expected}"))
    }

    /// The same failure, seen from further out.
    pub fn at(mut self, place: impl Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

/// Adds the place to a failure, at no cost where there is none.
pub trait At<T> {
    /// The same outcome, seen from further out.
    fn at(self, place: impl Display) -> Result<T>;
    /// A field of the array element `index`.
    fn at_index(self, array: &str, index: usize) -> Result<T>;
}

impl<T> At<T> for Result<T> {
    fn at(self, place: impl Display) -> Result<T> {
        self.map_err(|e| e.at(place))
    }

    fn at_index(self, array: &str, index: usize) -> Result<T> {
        self.map_err(|mut e| {
            e.message = format!("{array}[{index}].{}", e.message);
            e
        })
    }
}

/// Room for n elements; a status where there is none, since n comes from the caller.
pub fn reserve<T>(n: usize, what: &str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    match list.try_reserve_exact(n) {
        Ok(()) => Ok(list),
        Err(_) => Err(out_of_memory(n, what)),
    }
}

/// There is no room for n elements.
pub fn out_of_memory(n: usize, what: &str) -> Error {
    Error::new(Code::OutOfMemory, format!("no memory for {n} {what}"))
}
