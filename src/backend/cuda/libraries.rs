//! CUDA's libraries, found when a context asks for them: nothing is linked. The `-sys` crates give types, and what they
//! declare is held against our tables here; where they lack a function, its type stands below. Every return is a plain
//! number, since newer libraries return values that the crates' enumerations do not have.

use crate::error::{Code, Error, Result};
use cublas_sys as cublas;
use cuda_runtime_sys as cudart;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_longlong, c_uint, c_ulonglong, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What cuBLAS's handles are.
pub(super) type Handle = cublas::cublasHandle_t;
/// A stream, as the runtime has it.
pub(super) type RuntimeStream = cudart::cudaStream_t;
/// An object of the driver.
pub(super) type Opaque = *mut c_void;

/// Versions of the libraries that are looked for, the newest first.
const MAJORS: [u32; 2] = [13, 12];
/// The driver that the kernels' PTX needs, as `cudaDriverGetVersion` counts.
const OLDEST_DRIVER: c_int = 12_000;

/// Names of functions that a library lacks.
type Missing = Vec<&'static str>;

/// A table of functions; `as` holds a function against what a `-sys` crate declares.
macro_rules! table {
    (@held ($($argument:ty),*) $declared:path: $theirs:ty) => {
        const _: unsafe extern "C" fn($($argument),*) -> $theirs = $declared;
    };
    (@held ($($argument:ty),*)) => {};
    ($(#[$about:meta])* $table:ident {
        $($name:ident: fn($($argument:ty),*) -> $returns:ty $(, as $declared:path: $theirs:ty)?;)*
    }) => {
        $(#[$about])*
        #[expect(non_snake_case, reason = "CUDA's names")]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $returns,)*
        }

        $(table!(@held ($($argument),*) $($declared: $theirs)?);)*

        impl $table {
            /// Looks every function up; the names of those that are not there.
            fn load(mut find: impl FnMut(&'static CStr) -> *mut c_void) -> std::result::Result<Self, Missing> {
                let mut missing = Vec::new();
                $(
                    #[allow(non_snake_case, reason = "CUDA's names")]
                    let $name = find(const {
                        match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                            Ok(name) => name,
                            Err(_) => unreachable!(),
                        }
                    });
                    if $name.is_null() {
                        missing.push(stringify!($name));
                    }
                )*
                if !missing.is_empty() {
                    return Err(missing);
                }
                // SAFETY: not null, and functions of those names have these types in every version that is looked for.
                Ok(Self { $($name: unsafe {
                    std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $returns>($name)
                },)* })
            }
        }
    };
}

table! {
    /// `libcudart`.
    Runtime {
        cudaGetDeviceCount: fn(*mut c_int) -> c_int, as cudart::cudaGetDeviceCount: cudart::cudaError_t;
        cudaDriverGetVersion: fn(*mut c_int) -> c_int, as cudart::cudaDriverGetVersion: cudart::cudaError_t;
        cudaRuntimeGetVersion: fn(*mut c_int) -> c_int, as cudart::cudaRuntimeGetVersion: cudart::cudaError_t;
        cudaDeviceGetAttribute: fn(*mut c_int, cudart::cudaDeviceAttr, c_int) -> c_int,
            as cudart::cudaDeviceGetAttribute: cudart::cudaError_t;
        cudaGetLastError: fn() -> c_int, as cudart::cudaGetLastError: cudart::cudaError_t;
        cudaMemcpyAsync: fn(*mut c_void, *const c_void, usize, cudart::cudaMemcpyKind, RuntimeStream) -> c_int,
            as cudart::cudaMemcpyAsync: cudart::cudaError_t;
        cudaMemcpy2DAsync: fn(
            *mut c_void, usize, *const c_void, usize, usize, usize, cudart::cudaMemcpyKind, RuntimeStream
        ) -> c_int,
            as cudart::cudaMemcpy2DAsync: cudart::cudaError_t;
        cudaMemsetAsync: fn(*mut c_void, c_int, usize, RuntimeStream) -> c_int,
            as cudart::cudaMemsetAsync: cudart::cudaError_t;
        cudaMemset2DAsync: fn(*mut c_void, usize, c_int, usize, usize, RuntimeStream) -> c_int,
            as cudart::cudaMemset2DAsync: cudart::cudaError_t;
        cudaStreamSynchronize: fn(RuntimeStream) -> c_int, as cudart::cudaStreamSynchronize: cudart::cudaError_t;
        cudaStreamIsCapturing: fn(RuntimeStream, *mut cudart::cudaStreamCaptureStatus) -> c_int,
            as cudart::cudaStreamIsCapturing: cudart::cudaError_t;
        // Takes an error as a number: the crate's enumeration lacks the newer ones.
        cudaGetErrorName: fn(c_int) -> *const c_char;
        cudaGetErrorString: fn(c_int) -> *const c_char;
        cudaGetDriverEntryPoint: fn(*const c_char, *mut *mut c_void, c_ulonglong, *mut c_int) -> c_int;
    }
}

table! {
    /// The driver, reached through the runtime, which knows which version of each function it is.
    Driver {
        cuDeviceGet: fn(*mut c_int, c_int) -> c_int;
        cuDeviceGetName: fn(*mut c_char, c_int, c_int) -> c_int;
        cuDevicePrimaryCtxRetain: fn(*mut Opaque, c_int) -> c_int;
        cuDevicePrimaryCtxRelease: fn(c_int) -> c_int;
        cuCtxPushCurrent: fn(Opaque) -> c_int;
        cuCtxPopCurrent: fn(*mut Opaque) -> c_int;
        cuModuleLoadData: fn(*mut Opaque, *const c_void) -> c_int;
        cuModuleUnload: fn(Opaque) -> c_int;
        cuModuleGetFunction: fn(*mut Opaque, Opaque, *const c_char) -> c_int;
        cuLaunchKernel: fn(
            Opaque, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Opaque, *mut *mut c_void,
            *mut *mut c_void
        ) -> c_int;
        cuGetErrorName: fn(c_int, *mut *const c_char) -> c_int;
        cuGetErrorString: fn(c_int, *mut *const c_char) -> c_int;
    }
}

table! {
    /// What drivers have from CUDA 12.4 on.
    Loader {
        cuFuncLoad: fn(Opaque) -> c_int;
    }
}

table! {
    /// `libcublas`.
    Cublas {
        cublasCreate_v2: fn(*mut Handle) -> c_int, as cublas::cublasCreate_v2: cublas::cublasStatus_t;
        cublasDestroy_v2: fn(Handle) -> c_int, as cublas::cublasDestroy_v2: cublas::cublasStatus_t;
        cublasSetStream_v2: fn(Handle, cublas::cudaStream_t) -> c_int,
            as cublas::cublasSetStream_v2: cublas::cublasStatus_t;
        cublasGetStream_v2: fn(Handle, *mut cublas::cudaStream_t) -> c_int,
            as cublas::cublasGetStream_v2: cublas::cublasStatus_t;
        cublasSetPointerMode_v2: fn(Handle, cublas::cublasPointerMode_t) -> c_int,
            as cublas::cublasSetPointerMode_v2: cublas::cublasStatus_t;
        cublasGetPointerMode_v2: fn(Handle, *mut cublas::cublasPointerMode_t) -> c_int,
            as cublas::cublasGetPointerMode_v2: cublas::cublasStatus_t;
        cublasGetProperty: fn(c_int, *mut c_int) -> c_int;
        cublasSetWorkspace_v2: fn(Handle, *mut c_void, usize) -> c_int;
        cublasSetMathMode: fn(Handle, c_int) -> c_int;
        cublasGetMathMode: fn(Handle, *mut c_int) -> c_int;
        cublasGemmEx: fn(
            Handle, c_int, c_int, c_int, c_int, c_int, *const c_void, *const c_void, c_int, c_int, *const c_void,
            c_int, c_int, *const c_void, *mut c_void, c_int, c_int, c_int, c_int
        ) -> c_int;
        cublasGemmEx_64: fn(
            Handle, c_int, c_int, c_longlong, c_longlong, c_longlong, *const c_void, *const c_void, c_int,
            c_longlong, *const c_void, c_int, c_longlong, *const c_void, *mut c_void, c_int, c_longlong, c_int,
            c_int
        ) -> c_int;
        cublasGetStatusName: fn(c_int) -> *const c_char;
    }
}

/// A shared library of this process. Once it was called it is never closed: CUDA's libraries start threads and keep
/// state of their own.
struct Library {
    handle: *mut c_void,
    path: String,
}

impl Library {
    /// Opens a file or a soname; with `RTLD_NOLOAD`, only where the process has it.
    fn open(name: &OsStr, flags: c_int) -> std::result::Result<Self, String> {
        let shown = name.to_string_lossy();
        let Ok(c_name) = CString::new(name.as_bytes()) else { return Err(format!("{shown}: a zero byte in a name")) };
        // SAFETY: a zero-terminated name; what the library does when it is loaded is its own.
        let handle = unsafe { libc::dlopen(c_name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | flags) };
        if handle.is_null() {
            // SAFETY: the text is valid until this thread's next call of the loader.
            let reason = unsafe { text(libc::dlerror()) };
            return Err(reason.unwrap_or_else(|| format!("{shown}: the process has not loaded it")));
        }
        let library = Self { handle, path: shown.into() };
        let known = [c"cudaGetErrorName", c"cublasGetStatusName"];
        let file = if library.path.contains('/') {
            Some(library.path.clone())
        } else {
            known.into_iter().find_map(|f| file_of(library.symbol(f)))
        };
        let path = file.and_then(|f| Some(std::path::absolute(f).ok()?.to_string_lossy().into_owned()));
        Ok(Self { path: path.unwrap_or(library.path), handle })
    }

    /// Gives back what was not used.
    fn close(self) {
        // SAFETY: nothing was asked of it.
        unsafe { libc::dlclose(self.handle) };
    }

    fn symbol(&self, name: &CStr) -> *mut c_void {
        // SAFETY: an open library.
        unsafe { libc::dlsym(self.handle, name.as_ptr()) }
    }

    /// A file in the same folder.
    fn beside(&self, name: &str) -> Option<PathBuf> {
        Path::new(&self.path).parent().filter(|f| *f != Path::new("")).map(|f| f.join(name))
    }

    fn lacks(&self, missing: &[&str]) -> Error {
        unavailable(format!("{} lacks {}", self.path, missing.join(", ")))
    }
}

/// The file that a function came from.
fn file_of(function: *mut c_void) -> Option<String> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: any address may be asked for; on success the name is that of a library, which stays.
    unsafe { if libc::dladdr(function, info.as_mut_ptr()) == 0 { None } else { text(info.assume_init().dli_fname) } }
}

/// # Safety
/// Null, or a zero-terminated text.
unsafe fn text(from: *const c_char) -> Option<String> {
    // SAFETY: as this function asks.
    (!from.is_null()).then(|| unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned())
}

fn unavailable(message: impl Into<String>) -> Error {
    Error::new(Code::BackendUnavailable, message)
}

/// Both libraries, of one version.
struct Found {
    runtime: Library,
    blas: Library,
}

/// Versions in the order in which they are looked for: first those that the driver serves, if it can be asked.
fn majors() -> [u32; 2] {
    let mut majors = MAJORS;
    if let Some(driver) = driver_version() {
        majors.sort_by_key(|major| *major as c_int * 1000 > driver);
    }
    majors
}

/// What the driver says of itself, without being started.
fn driver_version() -> Option<c_int> {
    let function = Library::open(OsStr::new("libcuda.so.1"), 0).ok()?.symbol(c"cuDriverGetVersion");
    if function.is_null() {
        return None;
    }
    let mut version = 0;
    // SAFETY: the function of that name has this type in every version; one number is written.
    let code = unsafe {
        let function = std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> c_int>(function);
        function(&raw mut version)
    };
    (code == 0).then_some(version)
}

fn names(major: u32) -> [String; 2] {
    [format!("libcudart.so.{major}"), format!("libcublas.so.{major}")]
}

/// In the folders that the caller named, and nowhere else.
fn find_in(folders: &OsStr, lent_handle: bool) -> Result<Found> {
    let folders: Vec<&Path> = folders
        .as_bytes()
        .split(|b| *b == b':')
        .filter(|f| !f.is_empty())
        .map(|f| Path::new(OsStr::from_bytes(f)))
        .collect();
    let place = |name: &str| folders.iter().map(|f| f.join(name)).find(|p| p.exists());
    // The one that made a handle is loaded.
    let serves =
        |blas: &Path| !lent_handle || Library::open(blas.as_os_str(), libc::RTLD_NOLOAD).map(Library::close).is_ok();
    let mut tried = Vec::new();
    let mut foreign = None;
    for major in majors() {
        let names = names(major);
        match [place(&names[0]), place(&names[1])] {
            [Some(_), Some(blas)] if !serves(&blas) => foreign = foreign.or(Some(blas)),
            [Some(runtime), Some(blas)] => {
                let open = |path: &Path| {
                    Library::open(path.as_os_str(), 0)
                        .map_err(|reason| unavailable(format!("desc.library_folder: {reason}")))
                };
                let runtime = open(&runtime)?;
                // cuBLAS needs it under this name, and need not look for it where it lies.
                if let Some(helper) = place(&format!("libcublasLt.so.{major}")) {
                    open(&helper)?;
                }
                return Ok(Found { runtime, blas: open(&blas)? });
            }
            places => {
                tried.extend(names.iter().zip(&places).map(|(n, p)| {
                    p.as_ref().map_or_else(|| format!("{n} (not there)"), |p| format!("{}", p.display()))
                }));
            }
        }
    }
    if let Some(blas) = foreign {
        return Err(Error::argument(
            "desc.cublas_handle",
            format_args!("a handle, and {}, which the process has not loaded", blas.display()),
            "desc.library_folder to name the cuBLAS that made it",
        ));
    }
    let folders: Vec<_> = folders.iter().map(|f| f.to_string_lossy()).collect();
    Err(unavailable(format!(
        "desc.library_folder: found {} in {}, expected libcudart and libcublas of one version",
        tried.join(", "),
        folders.join(" and "),
    )))
}

/// Those that the process has, or that the loader finds.
fn find(lent_handle: bool) -> Result<Found> {
    let loaded = |name: &str| Library::open(OsStr::new(name), libc::RTLD_NOLOAD).ok();
    let mut present: Vec<_> = majors().map(|m| (m, names(m).map(|n| loaded(&n)))).into();
    // The version of which the process has both, or cuBLAS where a handle of it was lent, or either.
    present.sort_by_key(|(_, [runtime, blas])| {
        std::cmp::Reverse((lent_handle && blas.is_some(), runtime.is_some() && blas.is_some(), runtime.is_some()))
    });
    match present.iter().filter(|(_, [_, blas])| blas.is_some()).count() {
        0 if lent_handle => {
            return Err(Error::argument(
                "desc.cublas_handle",
                "a handle, and no cuBLAS in this process",
                "a handle of libcublas.so.13 or libcublas.so.12, loaded as a shared library",
            ));
        }
        2.. if lent_handle => {
            return Err(Error::argument(
                "desc.cublas_handle",
                "a handle, and cuBLAS of CUDA 13 and of CUDA 12 in this process",
                "desc.library_folder to name the one that made it",
            ));
        }
        _ => {}
    }
    let held: Vec<_> = present.iter().flat_map(|(_, list)| list).flatten().map(|l| l.path.clone()).collect();
    // One version alone where the process has any of it.
    if present.iter().any(|(_, list)| list.iter().any(Option::is_some)) {
        present.retain(|(_, list)| list.iter().any(Option::is_some));
        present.truncate(1);
    }
    let mut tried = Vec::new();
    for (major, [runtime, blas]) in present {
        let names = names(major);
        let aside = [(&blas, &names[0]), (&runtime, &names[1])].map(|(l, n)| l.as_ref().and_then(|l| l.beside(n)));
        let mut open = |present: Option<Library>, name: &str, aside: Option<&Path>| {
            present.or_else(|| {
                let places = [Some(OsStr::new(name)), aside.map(Path::as_os_str)];
                places.into_iter().flatten().find_map(|p| Library::open(p, 0).map_err(|r| tried.push(r)).ok())
            })
        };
        let runtime = open(runtime, &names[0], aside[0].as_deref());
        let blas = open(blas, &names[1], aside[1].as_deref());
        match (runtime, blas) {
            (Some(runtime), Some(blas)) => return Ok(Found { runtime, blas }),
            // Of the next version, both.
            (one, other) => one.into_iter().chain(other).for_each(Library::close),
        }
    }
    let held = if held.is_empty() {
        String::new()
    } else {
        format!("; the process has {}, and needs both of one version", held.join(" and "))
    };
    Err(unavailable(format!("CUDA's libraries are not here: {}{held}", tried.join("; "))))
}

/// The tables, and where they came from.
pub(super) struct Libraries {
    pub(super) runtime: Runtime,
    pub(super) driver: Driver,
    /// Where the driver has it.
    pub(super) loader: Option<Loader>,
    pub(super) blas: Cublas,
    /// How many devices there are.
    pub(super) devices: c_int,
    description: String,
}

// SAFETY: functions and a text.
unsafe impl Send for Libraries {}
// SAFETY: as above; CUDA's functions may be called from any thread.
unsafe impl Sync for Libraries {}

impl Libraries {
    /// Finds the libraries, all of their functions, a driver and a device.
    pub(super) fn load(folders: Option<&OsStr>, lent_handle: bool) -> Result<Self> {
        let found = match folders {
            Some(folders) => find_in(folders, lent_handle)?,
            None => find(lent_handle)?,
        };
        let runtime = Runtime::load(|name| found.runtime.symbol(name)).map_err(|m| found.runtime.lacks(&m))?;
        let blas = Cublas::load(|name| found.blas.symbol(name)).map_err(|m| found.blas.lacks(&m))?;
        let mut version = 0;
        // SAFETY: one number is written.
        let code = unsafe { (runtime.cudaRuntimeGetVersion)(&raw mut version) };
        runtime.check("cudaRuntimeGetVersion", code)?;
        let blas_version = blas.version()?;
        if version / 1000 != blas_version[0] || !MAJORS.contains(&(blas_version[0] as u32)) {
            return Err(unavailable(format!(
                "found CUDA {} in {} and cuBLAS {} in {}, expected both of CUDA 13 or both of CUDA 12",
                Version(version),
                found.runtime.path,
                blas_version.map(|n| n.to_string()).join("."),
                found.blas.path
            )));
        }
        let mut driver_version = 0;
        // SAFETY: one number is written; 0 where there is no driver.
        let code = unsafe { (runtime.cudaDriverGetVersion)(&raw mut driver_version) };
        let libraries = format!(
            "libcudart {} ({}), libcublas {} ({})",
            Version(version),
            found.runtime.path,
            blas_version.map(|n| n.to_string()).join("."),
            found.blas.path
        );
        let driver = match driver_version {
            0 => "no CUDA driver".into(),
            version => format!("a driver of CUDA {}", Version(version)),
        };
        let place = format!("{driver}, {libraries}");
        let located = |e: Error| Error::new(e.code, format!("{}; {place}", e.message));
        runtime.check("cudaDriverGetVersion", code).map_err(located)?;
        let mut devices = 0;
        // SAFETY: one number is written.
        let code = unsafe { (runtime.cudaGetDeviceCount)(&raw mut devices) };
        runtime.check("cudaGetDeviceCount", code).map_err(located)?;
        if devices == 0 {
            return Err(unavailable(format!("CUDA sees no device; {place}")));
        }
        if driver_version < OLDEST_DRIVER {
            return Err(unavailable(format!(
                "found a driver of CUDA {}, expected {} or later; {libraries}",
                Version(driver_version),
                Version(OLDEST_DRIVER)
            )));
        }
        let entry_point = |name: &CStr| {
            let (mut function, mut found) = (std::ptr::null_mut(), 0);
            // SAFETY: a zero-terminated name; a function and a number are written.
            let code =
                unsafe { (runtime.cudaGetDriverEntryPoint)(name.as_ptr(), &raw mut function, 0, &raw mut found) };
            runtime
                .check(format_args!("cudaGetDriverEntryPoint of {}", name.to_string_lossy()), code)
                .map(|()| function)
        };
        let mut failure = None;
        let mut find = |name: &CStr| {
            entry_point(name).unwrap_or_else(|e| {
                failure.get_or_insert(e);
                std::ptr::null_mut()
            })
        };
        let (driver, loader) = (Driver::load(&mut find), Loader::load(&mut find));
        if let Some(failure) = failure {
            return Err(located(failure));
        }
        let lacking = |missing: Missing| unavailable(format!("the driver lacks {}; {place}", missing.join(", ")));
        let (driver, loader) = (driver.map_err(lacking)?, loader.ok());
        Ok(Self { runtime, driver, loader, blas, devices, description: place })
    }

    /// Versions and paths.
    pub(super) fn describe(&self) -> &str {
        &self.description
    }
}

impl Runtime {
    /// "cudaMalloc: cudaErrorMemoryAllocation (2): out of memory".
    pub(super) fn check(&self, call: impl std::fmt::Display, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: any number may be asked for; the texts are constants. The error that this thread's next caller would
        // find is ours, and was reported.
        let [name, reason] = unsafe {
            (self.cudaGetLastError)();
            [(self.cudaGetErrorName)(code), (self.cudaGetErrorString)(code)].map(|t| text(t).unwrap_or_default())
        };
        let kind = if code == 2 { Code::OutOfMemory } else { Code::BackendUnavailable };
        Err(Error::new(kind, format!("{call}: {name} ({code}): {reason}")))
    }
}

impl Driver {
    /// "cuModuleLoadData: CUDA_ERROR_INVALID_PTX (218): a PTX JIT compilation failed".
    pub(super) fn check(&self, call: impl std::fmt::Display, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let [mut name, mut reason] = [std::ptr::null(); 2];
        // SAFETY: addresses of constants are written, or null for an unknown number.
        let [name, reason] = unsafe {
            (self.cuGetErrorName)(code, &raw mut name);
            (self.cuGetErrorString)(code, &raw mut reason);
            [name, reason].map(|t| text(t).unwrap_or_default())
        };
        let kind = if code == 2 { Code::OutOfMemory } else { Code::BackendUnavailable };
        Err(Error::new(kind, format!("{call}: {name} ({code}): {reason}")))
    }
}

impl Cublas {
    /// "cublasCreate_v2: CUBLAS_STATUS_NOT_INITIALIZED (1)".
    pub(super) fn check(&self, call: impl std::fmt::Display, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: any number may be asked for; the text is a constant.
        let name = unsafe { text((self.cublasGetStatusName)(code)) }.unwrap_or_default();
        let kind = if code == 3 { Code::OutOfMemory } else { Code::BackendUnavailable };
        Err(Error::new(kind, format!("{call}: {name} ({code})")))
    }

    fn version(&self) -> Result<[c_int; 3]> {
        let mut version = [0; 3];
        for (part, value) in version.iter_mut().enumerate() {
            // SAFETY: one number is written.
            let code = unsafe { (self.cublasGetProperty)(part as c_int, value) };
            self.check("cublasGetProperty", code)?;
        }
        Ok(version)
    }
}

/// 13020 as "13.2".
struct Version(c_int);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}
