//! One device: its primary context, the kernels' module, cuBLAS handles, and everything that is enqueued.

use super::libraries::{Handle, Libraries, Opaque, RuntimeStream};
use crate::context::{Level, Settings};
use crate::error::{Code, Error, Result};
use crate::tensor::{Address, Buffer, Dtype, Stream};
use arrayvec::ArrayVec;
use cublas_sys::cublasPointerMode_t as PointerMode;
use cuda_runtime_sys::{cudaDeviceAttr, cudaMemcpyKind, cudaStreamCaptureStatus};
use parking_lot::{Condvar, Mutex};
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

/// The kernels, as the driver compiles them for its device.
const PTX: &str = concat!(include_str!("kernels.ptx"), "\0");
/// cuBLAS handles of our own: so many calls enqueue products at the same time, and others wait. cuBLAS takes tens of
/// MiB for each.
const HANDLES: usize = 2;
/// The compute capability that the PTX is for.
const OLDEST_CAPABILITY: [c_int; 2] = [8, 0];
/// What cuBLAS asks of its workspace.
const WORKSPACE_ALIGNMENT: usize = 256;
/// Threads of a block.
const MAX_THREADS: u32 = 256;
/// Blocks of a grid.
const MAX_BLOCKS: usize = i32::MAX as usize;
/// Bytes of a kernel's structure.
const MAX_ARGUMENTS: usize = 4096;

/// `CUBLAS_OP_N`, `CUBLAS_OP_T`.
const OPERATIONS: [c_int; 2] = [0, 1];
/// `CUBLAS_COMPUTE_32F`.
const COMPUTE_32F: c_int = 68;
/// `CUBLAS_COMPUTE_64F`.
const COMPUTE_64F: c_int = 70;
/// `CUBLAS_COMPUTE_32F_FAST_TF32`.
const COMPUTE_32F_FAST_TF32: c_int = 77;
/// `CUBLAS_GEMM_DEFAULT`.
const GEMM_DEFAULT: c_int = -1;
/// `CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION`: parts of a sum are added in the compute type too.
const MATH_MODE: c_int = 16;

macro_rules! kernels {
    ($($kernel:ident: $name:literal,)*) => {
        /// A kernel, by its name in `kernels.cu`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Kernel { $($kernel,)* }

        impl Kernel {
            /// All of them, in their order.
            const ALL: &'static [Self] = &[$(Self::$kernel,)*];

            /// Its name.
            fn name(self) -> &'static CStr {
                const NAMES: &[&CStr] = &[$($name,)*];
                NAMES[self as usize]
            }
        }
    };
}

kernels! {
    PassMagnitudes: c"pass_magnitudes",
    PassPack: c"pass_pack",
    PassFinishFloat32: c"pass_finish_float32",
    PassFinishFloat64: c"pass_finish_float64",
    PassScales: c"pass_scales",
    PassExpand: c"pass_expand",
    PassGradient: c"pass_gradient",
    PassDrop: c"pass_drop",
    PassUndrop: c"pass_undrop",
    WeightInitialize: c"weight_initialize",
    WeightDeltaFloat32: c"weight_delta_float32",
    WeightDeltaFloat64: c"weight_delta_float64",
    GradientFactor: c"gradient_factor",
    AllocatorRebind: c"allocator_rebind",
    AllocatorPlan: c"allocator_plan",
    AllocatorSquares: c"allocator_squares",
    AllocatorNorm: c"allocator_norm",
    AllocatorUpdate: c"allocator_update",
    AllocatorScoreParts: c"allocator_score_parts",
    AllocatorScores: c"allocator_scores",
    AllocatorSelect: c"allocator_select",
    AllocatorFinish: c"allocator_finish",
    AllocatorGramFloat32: c"allocator_gram_float32",
    AllocatorGramFloat64: c"allocator_gram_float64",
    AllocatorDistance: c"allocator_distance",
    AllocatorPenaltyFloat32: c"allocator_penalty_float32",
    AllocatorPenaltyFloat64: c"allocator_penalty_float64",
    AllocatorDigest: c"allocator_digest",
    AllocatorGather: c"allocator_gather",
}

/// What a kernel takes.
///
/// # Safety
/// The type is `repr(C)` without padding, the twin of the kernel's own structure, and of at most 4 KB.
pub(super) unsafe trait Arguments: Copy {}

/// A device, and the libraries that reach it.
pub(super) struct Device {
    libraries: Arc<Libraries>,
    number: c_int,
    /// The process that made it: a child has no use of CUDA.
    process: u32,
    multiprocessors: usize,
    description: String,
    /// The caller's handle; calls on it wait for each other.
    lent: Option<Lent>,
    tf32: bool,
    ready: OnceLock<Ready>,
    preparing: Mutex<()>,
}

/// A handle of the caller's.
struct Lent(Mutex<Handle>);

// SAFETY: cuBLAS takes a handle from any thread, one at a time.
unsafe impl Send for Lent {}
// SAFETY: as above; the lock sees to it.
unsafe impl Sync for Lent {}

impl Device {
    /// Finds the libraries and the device. Takes no device memory.
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        let lent = settings.cublas_handle.map(|h| std::ptr::with_exposed_provenance_mut(h.0));
        let libraries = Libraries::load(settings.library_folder.as_deref(), lent.is_some())?;
        if settings.device >= libraries.devices {
            return Err(Error::new(
                Code::BackendUnavailable,
                format!(
                    "desc.device: found {}, expected 0 to {}: CUDA sees {} device(s); {}",
                    settings.device,
                    libraries.devices - 1,
                    libraries.devices,
                    libraries.describe(),
                ),
            ));
        }
        let number = settings.device;
        let attribute = |attribute: cudaDeviceAttr| {
            let mut value = 0;
            // SAFETY: a device that there is; one number is written.
            let code = unsafe { (libraries.runtime.cudaDeviceGetAttribute)(&raw mut value, attribute, number) };
            libraries.runtime.check("cudaDeviceGetAttribute", code).map(|()| value)
        };
        let multiprocessors = attribute(cudaDeviceAttr::cudaDevAttrMultiProcessorCount)?;
        let capability = [
            attribute(cudaDeviceAttr::cudaDevAttrComputeCapabilityMajor)?,
            attribute(cudaDeviceAttr::cudaDevAttrComputeCapabilityMinor)?,
        ];
        if capability < OLDEST_CAPABILITY {
            return Err(Error::new(
                Code::BackendUnavailable,
                format!(
                    "desc.device: found device {number}, {}, of compute capability {}.{}, expected {}.{} or later",
                    name_of(&libraries, number)?,
                    capability[0],
                    capability[1],
                    OLDEST_CAPABILITY[0],
                    OLDEST_CAPABILITY[1],
                ),
            ));
        }
        let description = format!(
            "CUDA backend, device {number}: {} (compute capability {}.{}, {multiprocessors} multiprocessors), {}",
            name_of(&libraries, number)?,
            capability[0],
            capability[1],
            libraries.describe(),
        );
        if let Some(log) = &settings.log {
            log(Level::Info, &description);
        }
        Ok(Self {
            libraries: Arc::new(libraries),
            number,
            process: std::process::id(),
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1).max(1),
            description,
            lent: lent.map(|h| Lent(Mutex::new(h))),
            tf32: settings.tf32,
            ready: OnceLock::new(),
            preparing: Mutex::new(()),
        })
    }

    pub(super) fn describe(&self) -> String {
        self.description.clone()
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Takes what the first call would take: the primary context, the module, cuBLAS handles.
    pub(super) fn prepare(&self, stream: Stream) -> Result<()> {
        self.same_process()?;
        match self.ready.get() {
            Some(ready) => ready.context.within(|| refuse_capture(&self.libraries, stream, PREPARE_FIRST)),
            None => self.make_ready(stream).map(|_| ()),
        }
    }

    /// Runs a call's part on the device, in a stream. The thread's own context and device are back afterwards.
    pub(super) fn enter<T>(&self, stream: Stream, body: impl FnOnce(&Session) -> Result<T>) -> Result<T> {
        self.same_process()?;
        let ready = self.make_ready(stream)?;
        ready.context.within(|| body(&Session { device: self, ready, stream, thread: PhantomData }))
    }

    fn same_process(&self) -> Result<()> {
        let process = std::process::id();
        if process == self.process {
            return Ok(());
        }
        Err(Error::new(
            Code::BackendUnavailable,
            format!(
                "this process, {process}, is a fork of process {}, which made the context: CUDA does not work in a \
                 forked child; make the context in the child, before its parent has used CUDA, or spawn the child",
                self.process
            ),
        ))
    }

    fn make_ready(&self, stream: Stream) -> Result<&Ready> {
        if let Some(ready) = self.ready.get() {
            return Ok(ready);
        }
        let _one = self.preparing.lock();
        if let Some(ready) = self.ready.get() {
            return Ok(ready);
        }
        let handles = if self.lent.is_some() { 0 } else { HANDLES };
        let ready = Ready::new(&self.libraries, self.number, handles, stream)?;
        Ok(self.ready.get_or_init(|| ready))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.same_process().is_err() {
            // What the parent holds is not the child's to give back.
            std::mem::forget(self.ready.take());
        }
    }
}

fn name_of(libraries: &Libraries, number: c_int) -> Result<String> {
    let mut device = 0;
    let mut name = [0; 256];
    // SAFETY: a number and a text of at most 256 bytes, its zero byte included, are written.
    unsafe {
        let code = (libraries.driver.cuDeviceGet)(&raw mut device, number);
        libraries.driver.check("cuDeviceGet", code)?;
        let code = (libraries.driver.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int, device);
        libraries.driver.check("cuDeviceGetName", code)?;
        Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
    }
}

/// What is done instead where modules and cuBLAS handles would be made.
const PREPARE_FIRST: &str = "adalora_context_prepare to be called before the capture";
/// What is done instead where the call waits.
const NOT_CAPTURED: &str = "one that is not: the call waits for it";

/// What cannot be done while a graph is being captured must not be tried: the capture would be lost.
fn refuse_capture(libraries: &Libraries, stream: Stream, expected: &str) -> Result<()> {
    let mut status = 0;
    let runtime = &libraries.runtime;
    // SAFETY: the caller's stream; one number is written, which is not read as the crate's enumeration.
    let code = unsafe {
        (runtime.cudaStreamIsCapturing)(runtime_stream(stream), (&raw mut status).cast::<cudaStreamCaptureStatus>())
    };
    // The legacy stream, while another one is captured.
    const STREAM_CAPTURE_IMPLICIT: c_int = 906;
    let outcome = runtime.check("cudaStreamIsCapturing", code);
    if code == STREAM_CAPTURE_IMPLICIT || (code == 0 && status != 0) {
        return Err(Error::new(
            Code::InvalidState,
            format!("stream: found one that is captured into a graph, expected {expected}"),
        ));
    }
    outcome
}

fn runtime_stream(stream: Stream) -> RuntimeStream {
    std::ptr::with_exposed_provenance_mut(stream.0)
}

/// A share in the device's primary context, which the runtime and PyTorch use too.
struct PrimaryContext {
    libraries: Arc<Libraries>,
    device: c_int,
    context: Opaque,
}

impl PrimaryContext {
    fn retain(libraries: &Arc<Libraries>, number: c_int) -> Result<Self> {
        let driver = &libraries.driver;
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        // SAFETY: a device that there is; a number and an address are written.
        unsafe {
            let code = (driver.cuDeviceGet)(&raw mut device, number);
            driver.check("cuDeviceGet", code)?;
            let code = (driver.cuDevicePrimaryCtxRetain)(&raw mut context, device);
            driver.check("cuDevicePrimaryCtxRetain", code)?;
        }
        Ok(Self { libraries: Arc::clone(libraries), device, context })
    }

    /// Runs a body with the context current, and puts back what was.
    fn within<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        struct Pushed<'a>(&'a Libraries);
        impl Pushed<'_> {
            fn pop(&self) -> Result<()> {
                let mut context = std::ptr::null_mut();
                // SAFETY: this thread pushed it; an address is written.
                let code = unsafe { (self.0.driver.cuCtxPopCurrent)(&raw mut context) };
                self.0.driver.check("cuCtxPopCurrent", code)
            }
        }
        impl Drop for Pushed<'_> {
            fn drop(&mut self) {
                // A panic goes on its way.
                let _ = self.pop();
            }
        }
        // SAFETY: retained by `self`.
        let code = unsafe { (self.libraries.driver.cuCtxPushCurrent)(self.context) };
        self.libraries.driver.check("cuCtxPushCurrent", code)?;
        let pushed = Pushed(&self.libraries);
        let outcome = body();
        let popped = pushed.pop();
        std::mem::forget(pushed);
        let value = outcome?;
        popped.map(|()| value).map_err(|e| {
            let told = "the call's work is enqueued, with what it changes in the library's own state; the device's \
                        context is still current in this thread";
            Error::new(Code::Incomplete, format!("{}; {told}", e.message))
        })
    }
}

impl Drop for PrimaryContext {
    fn drop(&mut self) {
        // SAFETY: retained once. A failure has nobody to tell it to.
        unsafe { (self.libraries.driver.cuDevicePrimaryCtxRelease)(self.device) };
    }
}

/// What `prepare` takes.
struct Ready {
    handles: Mutex<ArrayVec<Own, HANDLES>>,
    returned: Condvar,
    functions: Vec<Function>,
    module: Opaque,
    // Dropped last.
    context: PrimaryContext,
}

/// A cuBLAS handle of our own.
struct Own(Handle);

/// A kernel of the module.
#[derive(Clone, Copy)]
struct Function(Opaque);

// SAFETY: cuBLAS takes a handle from any thread, one at a time; the pool sees to it.
unsafe impl Send for Own {}
// SAFETY: the driver's objects may be used from any thread.
unsafe impl Send for Ready {}
// SAFETY: as above; handles are behind a lock.
unsafe impl Sync for Ready {}

impl Ready {
    /// The device's context need not be current.
    fn new(libraries: &Arc<Libraries>, device: c_int, handles: usize, stream: Stream) -> Result<Self> {
        let context = PrimaryContext::retain(libraries, device)?;
        let mut ready = Self {
            handles: Mutex::new(ArrayVec::new()),
            returned: Condvar::new(),
            functions: Vec::new(),
            module: std::ptr::null_mut(),
            context,
        };
        // What was made before a failure goes with `ready`.
        let made = {
            let Self { handles: pool, functions, module, context, .. } = &mut ready;
            context.within(|| {
                refuse_capture(libraries, stream, PREPARE_FIRST)?;
                let driver = &libraries.driver;
                // SAFETY: a zero-terminated text; an address is written.
                let code = unsafe { (driver.cuModuleLoadData)(&raw mut *module, PTX.as_ptr().cast()) };
                driver.check("cuModuleLoadData", code)?;
                for kernel in Kernel::ALL {
                    let mut function = std::ptr::null_mut();
                    // SAFETY: a loaded module and a zero-terminated name; an address is written.
                    let code =
                        unsafe { (driver.cuModuleGetFunction)(&raw mut function, *module, kernel.name().as_ptr()) };
                    driver.check(format_args!("cuModuleGetFunction of {}", kernel.name().to_string_lossy()), code)?;
                    if let Some(loader) = &libraries.loader {
                        // At a first launch CUDA may wait and allocate to load the code, which no capture allows.
                        // SAFETY: a function of a loaded module.
                        let code = unsafe { (loader.cuFuncLoad)(function) };
                        driver.check(format_args!("cuFuncLoad of {}", kernel.name().to_string_lossy()), code)?;
                    }
                    functions.push(Function(function));
                }
                for _ in 0..handles {
                    let blas = &libraries.blas;
                    let mut handle = std::ptr::null_mut();
                    // SAFETY: an address is written.
                    let code = unsafe { (blas.cublasCreate_v2)(&raw mut handle) };
                    blas.check("cublasCreate_v2", code)?;
                    pool.get_mut().push(Own(handle));
                    configure(libraries, handle)?;
                }
                Ok(())
            })
        };
        made.map(|()| ready)
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        let Self { handles, module, context, .. } = self;
        let libraries = &context.libraries;
        // A failure has nobody to tell it to.
        let _ = context.within(|| {
            for handle in handles.get_mut().drain(..) {
                // SAFETY: made by `new`, and nobody's any more.
                unsafe { (libraries.blas.cublasDestroy_v2)(handle.0) };
            }
            if !module.is_null() {
                // SAFETY: loaded by `new`, and nobody's any more.
                unsafe { (libraries.driver.cuModuleUnload)(*module) };
            }
            Ok(())
        });
    }
}

/// How products are computed.
fn configure(libraries: &Libraries, handle: Handle) -> Result<()> {
    let blas = &libraries.blas;
    // SAFETY: a live handle, in use by this thread alone.
    unsafe {
        let code = (blas.cublasSetMathMode)(handle, MATH_MODE);
        blas.check("cublasSetMathMode", code)?;
        let code = (blas.cublasSetPointerMode_v2)(handle, PointerMode::CUBLAS_POINTER_MODE_HOST);
        blas.check("cublasSetPointerMode_v2", code)
    }
}

/// A call's time on the device, in one stream, the device's context being current. Everything enqueues; what waits has
/// `_sync` in its name.
pub(super) struct Session<'a> {
    device: &'a Device,
    ready: &'a Ready,
    stream: Stream,
    /// The context is current in one thread.
    thread: PhantomData<*const ()>,
}

/// The same failure, in a call that had begun.
fn incomplete(e: Error) -> Error {
    Error::new(Code::Incomplete, e.message)
}

/// Says what a call leaves undefined that failed after it had begun.
pub(super) fn undefined(outputs: &str) -> impl FnOnce(Error) -> Error {
    move |e| match e.code {
        Code::Incomplete => Error::new(e.code, format!("{}; undefined now: {outputs}", e.message)),
        _ => e,
    }
}

impl Session<'_> {
    fn runtime(&self, call: &str, function: impl FnOnce(&super::libraries::Runtime) -> c_int) -> Result<()> {
        let runtime = &self.device.libraries.runtime;
        runtime.check(call, function(runtime)).map_err(incomplete)
    }

    /// Launches `blocks` blocks of `threads` threads; none where there are no blocks.
    pub(super) fn launch<A: Arguments>(&self, kernel: Kernel, blocks: usize, threads: u32, args: &A) -> Result<()> {
        const { assert!(size_of::<A>() <= MAX_ARGUMENTS) };
        if blocks == 0 {
            return Ok(());
        }
        let name = || kernel.name().to_string_lossy();
        if blocks > MAX_BLOCKS || !(1..=MAX_THREADS).contains(&threads) {
            return Err(Error::new(
                Code::Unsupported,
                format!("{}: found {blocks} blocks of {threads} threads, expected fewer", name()),
            ));
        }
        let driver = &self.device.libraries.driver;
        let mut parameters = [(&raw const *args).cast_mut().cast::<c_void>()];
        // SAFETY: a function of our module, whose only parameter `args` is; it is copied before the call returns.
        let code = unsafe {
            (driver.cuLaunchKernel)(
                self.ready.functions[kernel as usize].0,
                blocks as c_uint,
                1,
                1,
                threads,
                1,
                1,
                0,
                std::ptr::with_exposed_provenance_mut(self.stream.0),
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        driver.check(format_args!("cuLaunchKernel of {}", name()), code).map_err(incomplete)
    }

    /// Sets bytes.
    pub(super) fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: device memory of the caller's, as large as was checked.
        self.runtime("cudaMemsetAsync", |r| unsafe {
            (r.cudaMemsetAsync)(pointer(to), c_int::from(byte), bytes, runtime_stream(self.stream))
        })
    }

    /// Sets the first `width` bytes of rows that are `pitch` bytes apart.
    pub(super) fn fill_rows(&self, to: Address, pitch: usize, byte: u8, width: usize, rows: usize) -> Result<()> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        if width == pitch || rows == 1 {
            return self.fill(to, byte, width * rows);
        }
        // SAFETY: as in `fill`.
        self.runtime("cudaMemset2DAsync", |r| unsafe {
            (r.cudaMemset2DAsync)(pointer(to), pitch, c_int::from(byte), width, rows, runtime_stream(self.stream))
        })
    }

    /// Copies the first `width` bytes of rows that are so many bytes apart.
    pub(super) fn copy_rows(
        &self,
        from: Address,
        from_pitch: usize,
        to: Address,
        to_pitch: usize,
        width: usize,
        rows: usize,
    ) -> Result<()> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let kind = cudaMemcpyKind::cudaMemcpyDeviceToDevice;
        let stream = runtime_stream(self.stream);
        if rows == 1 || (width == from_pitch && width == to_pitch) {
            // SAFETY: device memory of the caller's, as large as was checked.
            return self.runtime("cudaMemcpyAsync", |r| unsafe {
                (r.cudaMemcpyAsync)(pointer(to), pointer(from), width * rows, kind, stream)
            });
        }
        // SAFETY: as above.
        self.runtime("cudaMemcpy2DAsync", |r| unsafe {
            (r.cudaMemcpy2DAsync)(pointer(to), to_pitch, pointer(from), from_pitch, width, rows, kind, stream)
        })
    }

    /// Copies from the host, and waits.
    pub(super) fn upload_sync(&self, from: &[u8], to: Address) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.refuse_capture()?;
        // SAFETY: device memory as large as was checked; the host's is read before this function returns.
        let enqueued = self.runtime("cudaMemcpyAsync", |r| unsafe {
            let kind = cudaMemcpyKind::cudaMemcpyHostToDevice;
            (r.cudaMemcpyAsync)(pointer(to), from.as_ptr().cast(), from.len(), kind, runtime_stream(self.stream))
        });
        enqueued.and_then(|()| self.wait())
    }

    /// Copies to the host, and waits.
    pub(super) fn download_sync(&self, from: Address, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.refuse_capture()?;
        // SAFETY: device memory as large as was checked; the host's is written before this function returns.
        let enqueued = self.runtime("cudaMemcpyAsync", |r| unsafe {
            let kind = cudaMemcpyKind::cudaMemcpyDeviceToHost;
            (r.cudaMemcpyAsync)(to.as_mut_ptr().cast(), pointer(from), to.len(), kind, runtime_stream(self.stream))
        });
        enqueued.and_then(|()| self.wait())
    }

    /// Waits for the stream.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.refuse_capture()?;
        self.wait()
    }

    fn refuse_capture(&self) -> Result<()> {
        let outcome = refuse_capture(&self.device.libraries, self.stream, NOT_CAPTURED);
        outcome.map_err(|e| if e.code == Code::InvalidState { e } else { incomplete(e) })
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the caller's stream.
        self.runtime("cudaStreamSynchronize", |r| unsafe { (r.cudaStreamSynchronize)(runtime_stream(self.stream)) })
    }

    /// Runs a body that multiplies by cuBLAS, whose handle is the body's alone. Not to be nested: handles are few.
    pub(super) fn blas<T>(&self, workspace: Buffer, body: impl FnOnce(&Blas) -> Result<T>) -> Result<T> {
        let run = |handle: Handle| {
            let blas = Blas { session: self, handle };
            blas.begin(workspace)?;
            body(&blas)
        };
        match &self.device.lent {
            None => {
                let own = Lease::take(self.ready);
                run(own.handle())
            }
            Some(lent) => {
                let handle = lent.0.lock();
                let found = Modes::read(self.device, *handle)?;
                let outcome =
                    configure(&self.device.libraries, *handle).map_err(incomplete).and_then(|()| run(*handle));
                let restored = found.write(self.device, *handle);
                let value = outcome?;
                restored.map(|()| value)
            }
        }
    }
}

fn pointer(address: Address) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(address.0)
}

/// A handle of the pool, until it is dropped.
struct Lease<'a> {
    ready: &'a Ready,
    own: Option<Own>,
}

impl<'a> Lease<'a> {
    fn take(ready: &'a Ready) -> Self {
        let mut pool = ready.handles.lock();
        loop {
            if let Some(own) = pool.pop() {
                return Self { ready, own: Some(own) };
            }
            ready.returned.wait(&mut pool);
        }
    }

    fn handle(&self) -> Handle {
        self.own.as_ref().map_or(std::ptr::null_mut(), |own| own.0)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.ready.handles.lock().extend(self.own.take());
        self.ready.returned.notify_one();
    }
}

/// What of a lent handle can be read and put back.
struct Modes {
    stream: cublas_sys::cudaStream_t,
    math: c_int,
    pointers: c_int,
}

impl Modes {
    fn read(device: &Device, handle: Handle) -> Result<Self> {
        let blas = &device.libraries.blas;
        let mut modes = Self { stream: std::ptr::null_mut(), math: 0, pointers: 0 };
        // SAFETY: the caller's live handle, which is this thread's until the lock is given back; values are written,
        // and numbers are not read as the crate's enumeration.
        unsafe {
            let code = (blas.cublasGetStream_v2)(handle, &raw mut modes.stream);
            blas.check("cublasGetStream_v2 of desc.cublas_handle", code).map_err(incomplete)?;
            let code = (blas.cublasGetMathMode)(handle, &raw mut modes.math);
            blas.check("cublasGetMathMode of desc.cublas_handle", code).map_err(incomplete)?;
            let code = (blas.cublasGetPointerMode_v2)(handle, (&raw mut modes.pointers).cast());
            blas.check("cublasGetPointerMode_v2 of desc.cublas_handle", code).map_err(incomplete)?;
        }
        Ok(modes)
    }

    /// Everything is put back that can be; the first failure is told.
    fn write(&self, device: &Device, handle: Handle) -> Result<()> {
        let blas = &device.libraries.blas;
        let pointers = match self.pointers {
            0 => PointerMode::CUBLAS_POINTER_MODE_HOST,
            _ => PointerMode::CUBLAS_POINTER_MODE_DEVICE,
        };
        // SAFETY: as in `read`.
        let codes = unsafe {
            [
                ("cublasSetStream_v2", (blas.cublasSetStream_v2)(handle, self.stream)),
                ("cublasSetMathMode", (blas.cublasSetMathMode)(handle, self.math)),
                ("cublasSetPointerMode_v2", (blas.cublasSetPointerMode_v2)(handle, pointers)),
            ]
        };
        let outcomes = codes.map(|(call, code)| {
            blas.check(format_args!("{call} of desc.cublas_handle, to put back what was found"), code)
                .map_err(incomplete)
        });
        outcomes.into_iter().collect()
    }
}

/// A row-major operand: `data` [rows, columns] with `stride` elements from row to row, used transposed or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) data: Address,
    pub(super) stride: usize,
    pub(super) dtype: Dtype,
    pub(super) transposed: bool,
}

impl Operand {
    fn operation(&self) -> c_int {
        OPERATIONS[usize::from(self.transposed)]
    }
}

/// Row-major `c[m, n] = alpha * op(a)[m, k] op(b)[k, n] + beta * c`; c is not transposed. a and b are of one type, c is
/// of that type or float32.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gemm {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) alpha: f64,
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) beta: f64,
    pub(super) c: Operand,
}

/// An element type, as kernels number them: as the header does.
pub(super) fn code(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::Float32 => 1,
        Dtype::Float64 => 2,
        Dtype::Bfloat16 => 3,
        Dtype::Float16 => 4,
    }
}

/// `cudaDataType`.
fn data_type(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::Float32 => 0,
        Dtype::Float64 => 1,
        Dtype::Float16 => 2,
        Dtype::Bfloat16 => 14,
    }
}

/// Multiplies in a session's stream.
pub(super) struct Blas<'a> {
    session: &'a Session<'a>,
    handle: Handle,
}

impl Blas<'_> {
    /// Sets the stream, and then the workspace, which a new stream takes away.
    fn begin(&self, workspace: Buffer) -> Result<()> {
        let blas = &self.session.device.libraries.blas;
        let begin = workspace.data.0.next_multiple_of(WORKSPACE_ALIGNMENT);
        let bytes = workspace.bytes.saturating_sub(begin - workspace.data.0);
        // SAFETY: a live handle, in use by this thread alone; device memory that the caller lends to the stream.
        unsafe {
            let stream = std::ptr::with_exposed_provenance_mut(self.session.stream.0);
            let code = (blas.cublasSetStream_v2)(self.handle, stream);
            blas.check("cublasSetStream_v2", code).map_err(incomplete)?;
            let code = (blas.cublasSetWorkspace_v2)(self.handle, pointer(Address(begin)), bytes);
            blas.check("cublasSetWorkspace_v2", code).map_err(incomplete)
        }
    }

    /// Enqueues a product.
    pub(super) fn gemm(&self, g: &Gemm) -> Result<()> {
        debug_assert!(!g.c.transposed && g.a.dtype == g.b.dtype);
        if g.m == 0 || g.n == 0 || (g.k == 0 && g.beta == 1.0) {
            return Ok(());
        }
        if g.k == 0 && g.beta == 0.0 {
            let element = g.c.dtype.size();
            return self.session.fill_rows(g.c.data, g.c.stride * element, 0, g.n * element, g.m);
        }
        let device = self.session.device;
        let compute = match (g.a.dtype, device.tf32) {
            (Dtype::Float64, _) => COMPUTE_64F,
            (Dtype::Float32, true) => COMPUTE_32F_FAST_TF32,
            _ => COMPUTE_32F,
        };
        let single = [g.alpha as f32, g.beta as f32];
        let double = [g.alpha, g.beta];
        let [alpha, beta]: [*const c_void; 2] = if compute == COMPUTE_64F {
            double.each_ref().map(|s| (&raw const *s).cast())
        } else {
            single.each_ref().map(|s| (&raw const *s).cast())
        };
        let [a, b, c] = [&g.a, &g.b, &g.c].map(|o| (pointer(o.data), data_type(o.dtype), o.operation()));
        let extents = [g.n, g.m, g.k, g.b.stride, g.a.stride, g.c.stride];
        let blas = &device.libraries.blas;
        // cuBLAS is column-major, in which each matrix is its transpose: c^T = op(b)^T op(a)^T.
        macro_rules! call {
            ($function:ident, $integer:ty) => {{
                let [n, m, k, ldb, lda, ldc] = extents.map(|e| e as $integer);
                // SAFETY: a live handle, in use by this thread alone; operands in device memory as large as was
                // checked; both scalars are read before the call returns, as the host's pointer mode says.
                let code = unsafe {
                    (blas.$function)(
                        self.handle,
                        b.2,
                        a.2,
                        n,
                        m,
                        k,
                        alpha,
                        b.0,
                        b.1,
                        ldb,
                        a.0,
                        a.1,
                        lda,
                        beta,
                        c.0,
                        c.1,
                        ldc,
                        compute,
                        GEMM_DEFAULT,
                    )
                };
                (stringify!($function), code)
            }};
        }
        let small = extents.iter().all(|e| c_int::try_from(*e).is_ok());
        let (name, code) = if small { call!(cublasGemmEx, c_int) } else { call!(cublasGemmEx_64, i64) };
        let whose = if device.lent.is_some() { " by desc.cublas_handle" } else { "" };
        blas.check(format_args!("{name} of [{}, {}] x [{}, {}]{whose}", g.m, g.k, g.k, g.n), code).map_err(incomplete)
    }
}
