//! Status numbers, versions, and the text of the last error.

use super::types::Status;
use std::ffi::c_char;

/// All went well.
pub const ADALORA_SUCCESS: i32 = 0;
/// An argument is wrong; nothing was changed.
pub const ADALORA_ERROR_INVALID_ARGUMENT: i32 = 1;
/// A handle is NULL or of another kind; nothing was changed.
pub const ADALORA_ERROR_INVALID_HANDLE: i32 = 2;
/// The call does not fit the object's state, such as an update before a bind; nothing was changed.
pub const ADALORA_ERROR_INVALID_STATE: i32 = 3;
/// Memory for the library's own use could not be had; nothing was changed.
pub const ADALORA_ERROR_OUT_OF_MEMORY: i32 = 4;
/// The combination is legal, and this backend does not have it; nothing was changed.
pub const ADALORA_ERROR_UNSUPPORTED: i32 = 5;
/// The backend is not in this library, or this machine lacks what it needs.
pub const ADALORA_ERROR_BACKEND_UNAVAILABLE: i32 = 6;
/// Work failed after it had begun: the outputs that the text names are undefined, the library's own state is as it was
/// unless the text says otherwise.
pub const ADALORA_ERROR_INCOMPLETE: i32 = 7;
/// Bytes from outside are damaged; nothing was changed.
pub const ADALORA_ERROR_CORRUPT_DATA: i32 = 8;
/// A defect of the library: the text says where. Please report it.
pub const ADALORA_ERROR_INTERNAL: i32 = 9;
/// A file or folder is not there; nothing was changed.
pub const ADALORA_ERROR_NOT_FOUND: i32 = 10;
/// The operating system refused to read or write a file: the text says which, and why. Files are as they were.
pub const ADALORA_ERROR_IO: i32 = 11;

/// Version of the interface that this header describes. It changes where a caller compiled against an older header
/// would break.
pub const ADALORA_ABI_VERSION: u32 = 1;

/// Version of the library: `major << 16 | minor << 8 | patch`.
#[unsafe(no_mangle)]
pub extern "C" fn adalora_version() -> u32 {
    crate::VERSION
}

/// Version of the interface that the library serves: compare it with `ADALORA_ABI_VERSION` after loading.
#[unsafe(no_mangle)]
pub extern "C" fn adalora_abi_version() -> u32 {
    ADALORA_ABI_VERSION
}

/// The name of a status, such as "ADALORA_ERROR_INVALID_ARGUMENT"; "unknown status" for another number. Never NULL,
/// valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn adalora_status_name(status: Status) -> *const c_char {
    let name = match status {
        ADALORA_SUCCESS => c"ADALORA_SUCCESS",
        ADALORA_ERROR_INVALID_ARGUMENT => c"ADALORA_ERROR_INVALID_ARGUMENT",
        ADALORA_ERROR_INVALID_HANDLE => c"ADALORA_ERROR_INVALID_HANDLE",
        ADALORA_ERROR_INVALID_STATE => c"ADALORA_ERROR_INVALID_STATE",
        ADALORA_ERROR_OUT_OF_MEMORY => c"ADALORA_ERROR_OUT_OF_MEMORY",
        ADALORA_ERROR_UNSUPPORTED => c"ADALORA_ERROR_UNSUPPORTED",
        ADALORA_ERROR_BACKEND_UNAVAILABLE => c"ADALORA_ERROR_BACKEND_UNAVAILABLE",
        ADALORA_ERROR_INCOMPLETE => c"ADALORA_ERROR_INCOMPLETE",
        ADALORA_ERROR_CORRUPT_DATA => c"ADALORA_ERROR_CORRUPT_DATA",
        ADALORA_ERROR_INTERNAL => c"ADALORA_ERROR_INTERNAL",
        ADALORA_ERROR_NOT_FOUND => c"ADALORA_ERROR_NOT_FOUND",
        ADALORA_ERROR_IO => c"ADALORA_ERROR_IO",
        _ => c"unknown status",
    };
    name.as_ptr()
}

/// The text of this thread's last error: which call, which adapter, which argument, what was found and what was
/// expected. Empty before the first. A call that succeeds leaves it alone. Never NULL; valid until this thread's next
/// failing call.
#[unsafe(no_mangle)]
pub extern "C" fn adalora_last_error() -> *const c_char {
    super::guard::last_error()
}
