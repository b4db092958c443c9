//! The boundary: nothing but a status leaves it, whatever happens inside.

use super::status::*;
use super::types::Status;
use crate::backend::panics;
use crate::error::{Code, Error, Result};
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// What a handle is. The values are arbitrary, far from what other memory holds.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Kind {
    Context = 0x6144_6c4f_0001,
    Adapter = 0x6144_6c4f_0002,
    Allocator = 0x6144_6c4f_0003,
    Checkpoint = 0x6144_6c4f_0004,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Context => "an adalora_context_t",
            Self::Adapter => "an adalora_adapter_t",
            Self::Allocator => "an adalora_allocator_t",
            Self::Checkpoint => "an adalora_checkpoint_t",
        }
    }
}

/// What a handle points to. The kind comes first in each, so that a handle of another kind is noticed.
#[repr(C)]
pub(super) struct Handle<T> {
    kind: u64,
    object: T,
}

impl<T> Handle<T> {
    pub(super) fn new(kind: Kind, object: T) -> Self {
        Self { kind: kind as u64, object }
    }

    /// The object, if this is a handle of that kind.
    pub(super) fn get(&self, kind: Kind, name: &str) -> Result<&T> {
        if self.kind == kind as u64 {
            return Ok(&self.object);
        }
        let kinds = [Kind::Context, Kind::Adapter, Kind::Allocator, Kind::Checkpoint];
        let found = kinds.into_iter().find(|k| *k as u64 == self.kind);
        let found = found.map_or("no handle of this library (destroyed already?)", Kind::name);
        Err(Error::new(Code::InvalidHandle, format!("{name}: found {found}, expected {}", kind.name())))
    }
}

fn null(name: &str) -> Error {
    Error::new(Code::InvalidHandle, format!("{name}: found NULL, expected a handle"))
}

/// A borrowed handle.
pub(super) fn required<'a, T>(handle: Option<&'a T>, name: &str) -> Result<&'a T> {
    handle.ok_or_else(|| null(name))
}

/// A handle that C sees as not const. What it points to locks itself, so that sharing it is enough.
pub(super) fn shared<'a, T>(handle: Option<NonNull<T>>, name: &str) -> Result<&'a T> {
    // SAFETY: the caller passes a live handle, as every function's documentation asks; it stays alive during the call.
    handle.map(|h| unsafe { h.as_ref() }).ok_or_else(|| null(name))
}

/// Where an output goes.
pub(super) fn output<'a, T>(slot: Option<&'a mut MaybeUninit<T>>, name: &str) -> Result<&'a mut MaybeUninit<T>> {
    slot.ok_or_else(|| Error::argument(name, "NULL", "an address to write to"))
}

/// Frees a handle of that kind; null is nothing, another kind is left alone.
///
/// # Safety
/// The caller gives the handle up, and it came from `Box::into_raw`.
pub(super) unsafe fn destroy<T, O>(
    handle: Option<NonNull<T>>,
    kind: Kind,
    name: &str,
    head: impl Fn(&T) -> &Handle<O>,
) -> Result<()> {
    let Some(handle) = handle else { return Ok(()) };
    // SAFETY: the handle is live, and this call's alone.
    let object = unsafe { handle.as_ref() };
    head(object).get(kind, name)?;
    // SAFETY: of the right kind, so made by `Box::into_raw` of this very type.
    let mut owned = unsafe { Box::from_raw(handle.as_ptr()) };
    // A second destroy of memory that was not used again finds no kind. The write is volatile, or it would be dropped
    // with the box.
    let first: *mut T = &mut *owned;
    // SAFETY: the handle begins with its kind, and is ours to write.
    unsafe { first.cast::<u64>().write_volatile(0) };
    Ok(())
}

/// Runs the body of a C function.
pub(super) fn guard(call: &'static str, body: impl FnOnce() -> Result<()>) -> Status {
    let error = match panics::quietly(body) {
        Ok(Ok(())) => return ADALORA_SUCCESS,
        Ok(Err(error)) => error,
        Err(panic) => Error::new(Code::Internal, panic),
    };
    let status = match error.code {
        Code::InvalidArgument => ADALORA_ERROR_INVALID_ARGUMENT,
        Code::InvalidHandle => ADALORA_ERROR_INVALID_HANDLE,
        Code::InvalidState => ADALORA_ERROR_INVALID_STATE,
        Code::OutOfMemory => ADALORA_ERROR_OUT_OF_MEMORY,
        Code::Unsupported => ADALORA_ERROR_UNSUPPORTED,
        Code::BackendUnavailable => ADALORA_ERROR_BACKEND_UNAVAILABLE,
        Code::Incomplete => ADALORA_ERROR_INCOMPLETE,
        Code::CorruptData => ADALORA_ERROR_CORRUPT_DATA,
        Code::NotFound => ADALORA_ERROR_NOT_FOUND,
        Code::Io => ADALORA_ERROR_IO,
        Code::Internal => ADALORA_ERROR_INTERNAL,
    };
    let text = format!("{call}: {}", error.message).replace('\0', " ");
    let text = CString::new(text).unwrap_or_default();
    // A thread that is ending may have no slot any more; the status still tells.
    let _ = LAST_ERROR.try_with(|slot| slot.replace(text));
    status
}

/// Runs the body of a C function that returns nothing; a failure is left in the last error.
pub(super) fn guard_void(call: &'static str, body: impl FnOnce() -> Result<()>) {
    guard(call, body);
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

/// The text of this thread's last failure.
pub(super) fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|slot| slot.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Copies bytes to where the caller has room, and says how many there are. `text` adds a zero byte.
///
/// # Safety
/// `to` has room for `*room` bytes, or is null.
pub(super) unsafe fn copy_out(
    bytes: &[u8],
    text: bool,
    to: *mut u8,
    room: Option<&mut usize>,
    [name, size_name]: [&str; 2],
) -> Result<()> {
    let size = room.ok_or_else(|| Error::argument(size_name, "NULL", "the address of a size"))?;
    let needed = bytes.len() + usize::from(text);
    let found = std::mem::replace(size, needed);
    if to.is_null() {
        return Ok(());
    }
    if found < needed {
        return Err(Error::argument(name, format_args!("room for {found} bytes"), format_args!("{needed}")));
    }
    // SAFETY: there is room for `needed` bytes.
    unsafe {
        to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        if text {
            to.add(bytes.len()).write(0);
        }
    }
    Ok(())
}
