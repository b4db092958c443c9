//! Calls on contexts.

use super::memory::{Fill, Writes, bytes_of, encode};
use super::{Choices, Expect, Outcome, World, call, ensure};
use crate::abi::adapter::Adapter as AdapterHandle;
use crate::abi::context::{Context as Handle, *};
use crate::abi::types::*;
use std::ffi::{c_char, c_void};
use std::mem::{MaybeUninit, offset_of};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A context of the caller's.
pub(super) struct Context {
    pub(super) id: u64,
    pub(super) handle: *mut Handle,
}

unsafe extern "C" fn count(user: *mut c_void, level: i32, text: *const c_char) {
    assert!([ADALORA_LOG_WARNING, ADALORA_LOG_INFO].contains(&level));
    // SAFETY: the library's text, ended by a zero byte, and the counter that the context was given.
    let (text, counter) = unsafe { (std::ffi::CStr::from_ptr(text), &*user.cast::<AtomicUsize>()) };
    assert!(!text.is_empty());
    counter.fetch_add(1, Ordering::Relaxed);
}

impl World {
    pub(super) fn create_context(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let mut d = ContextDesc {
            struct_size: 0,
            backend: ADALORA_BACKEND_CPU,
            device: 0,
            threads: self.threads.threads,
            reserved: 0,
            cublas_handle: std::ptr::null_mut(),
            library_folder: std::ptr::null(),
            parallel: self.threads.parallel,
            log: None,
            log_user: std::ptr::null_mut(),
            tf32: 0,
            reserved_end: 0,
        };
        let heard = self.messages.load(Ordering::Relaxed);
        let listens = c.chance(50);
        if listens {
            d.log = Some(count);
            d.log_user = (&raw const *self.messages).cast_mut().cast();
        }
        let (mut null, mut sizes, mut no_slot) = (false, None, false);
        if let Some(w) = w {
            match w.below(11) {
                0 => (null, ()) = (true, expect.argument("desc")),
                1 => (sizes, ()) = (Some(0), ()),
                2 => (no_slot, ()) = (true, expect.argument("context")),
                3 => (d.backend, ()) = (w.pick(&[0, 3, -1, i32::MAX]), expect.argument("desc.backend")),
                4 => (d.device, ()) = (w.pick(&[1, -1]), expect.argument("desc.device")),
                5 => (d.threads, ()) = (w.pick(&[-1, 1025, i32::MIN]), expect.argument("desc.threads")),
                6 => (d.reserved, ()) = (w.pick(&[1, -1]), expect.argument("desc.reserved")),
                7 => (d.cublas_handle, ()) = (16 as *mut c_void, expect.argument("desc.cublas_handle")),
                8 => (d.tf32, ()) = (w.pick(&[1, 2, -1]), expect.argument("desc.tf32")),
                9 => (d.reserved_end, ()) = (w.pick(&[1, -1]), expect.argument("desc.reserved_end")),
                _ => (d.library_folder, ()) = (c"/nowhere".as_ptr(), expect.argument("desc.library_folder")),
            }
        }
        let minimum = offset_of!(ContextDesc, backend) + 4;
        let (place, _, wrong) = self.memory.descriptors(&[bytes_of(&d)], minimum, sizes, c);
        if sizes.is_some() {
            expect.argument(format!("desc{wrong}"));
        }
        let desc = if null { std::ptr::null() } else { self.memory.pointer::<ContextDesc>(place).cast_const() };
        let slot = self.slot(c);
        let pointer = self.memory.pointer::<MaybeUninit<*mut Handle>>(slot);
        let mut writes = Writes::default();
        writes.bytes(slot, 8);
        if call!(self, expect, writes, adalora_context_create(desc, if no_slot { None } else { Some(&mut *pointer) }))?
        {
            let (id, handle) = (self.number(), self.handle_at(slot));
            self.contexts.push(Context { id, handle });
            ensure!(!listens || self.messages.load(Ordering::Relaxed) > heard, "a context that says nothing");
        }
        Ok(())
    }

    /// Position of a context, made if there is none.
    pub(super) fn some_context(&mut self, c: &mut Choices) -> Result<usize, String> {
        if self.contexts.is_empty() {
            self.create_context(c, None)?;
        }
        Ok(c.below(self.contexts.len()))
    }

    /// The handle, or, where it is to be spoilt, null or a handle of another kind.
    pub(super) fn context_handle(&mut self, i: usize, spoil: bool, c: &mut Choices) -> Option<NonNull<Handle>> {
        let handle = NonNull::new(self.contexts[i].handle);
        if !spoil {
            return handle;
        }
        let other: Option<NonNull<AdapterHandle>> = self.adapters.first().and_then(|a| NonNull::new(a.handle));
        if c.chance(50) { other.map(NonNull::cast) } else { None }
    }

    pub(super) fn destroy_context(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_context(c)?;
        let handle = self.context_handle(i, w.is_some(), c);
        let mut expect = Expect::default();
        if w.is_some() && handle.is_some() {
            expect.handle("context");
        }
        if w.is_none() {
            self.contexts.swap_remove(i);
        }
        self.perform_void("adalora_context_destroy", expect, || {
            // SAFETY: a live handle that is given up, or null, or one of another kind.
            unsafe { adalora_context_destroy(handle) }
        })
    }

    pub(super) fn prepare(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_context(c)?;
        let mut expect = Expect::default();
        if w.is_some() {
            expect.handle("context");
        }
        let handle = self.context_handle(i, w.is_some(), c);
        let stream = c.pick(&[0usize, 8]) as *mut c_void;
        call!(self, expect, Writes::default(), adalora_context_prepare(handle, stream)).map(drop)
    }

    pub(super) fn describe(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_context(c)?;
        let size = self.memory.private(8, 8, c);
        let bytes = self.memory.pointer::<usize>(size);
        let ask = |size| {
            let mut writes = Writes::default();
            writes.even_if_refused(size, 8);
            writes
        };
        let handle = self.context_handle(i, false, c);
        call!(
            self,
            Expect::default(),
            ask(size),
            adalora_context_describe(handle.map(|h| h.as_ref()), std::ptr::null_mut(), Some(&mut *bytes))
        )?;
        let needed = self.memory.read_i64(size, 0) as usize;
        let mut expect = Expect::default();
        let (mut room, mut handle, mut no_size) = (needed + c.pick(&[0, 0, 3]), handle, false);
        if let Some(w) = w {
            match w.below(3) {
                0 => (room, ()) = (w.pick(&[0, needed - 1]), expect.argument("text")),
                1 => (handle, ()) = (self.context_handle(i, true, w), expect.handle("context")),
                _ => (no_size, ()) = (true, expect.argument("bytes")),
            }
        }
        self.memory.write(size, &room.to_le_bytes());
        let place = self.memory.private(room, 1, c);
        let text = self.memory.pointer::<c_char>(place);
        let mut writes = ask(size);
        writes.bytes(place, needed.min(room));
        if call!(
            self,
            expect,
            writes,
            adalora_context_describe(handle.map(|h| h.as_ref()), text, if no_size { None } else { Some(&mut *bytes) })
        )? {
            let text = self.memory.read(place, needed);
            ensure!(text.iter().position(|b| *b == 0) == Some(needed - 1), "the text is not {needed} bytes long");
        }
        Ok(())
    }

    pub(super) fn gradient_factor(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_context(c)?;
        let one = self.memory.place(8, 8, c);
        let two = self.memory.place(8, 8, c);
        self.memory.fill(one, 1, ADALORA_FLOAT64, Fill::some(c), c);
        self.memory.fill(two, 1, ADALORA_FLOAT64, Fill::some(c), c);
        let to = self.memory.bytes(&encode(0.0, ADALORA_FLOAT64), 8, c);
        let mut handle = self.context_handle(i, false, c);
        let mut sum = self.memory.pointer::<f64>(one).cast_const();
        let mut scale = if c.chance(50) { std::ptr::null() } else { self.memory.pointer::<f64>(two).cast_const() };
        let mut max_norm = c.pick(&[1.0, 0.1, f64::INFINITY, 5e-324]);
        let mut factor = self.memory.pointer::<f64>(to);
        let mut expect = Expect::default();
        if let Some(w) = w {
            match w.below(8) {
                7 => {
                    factor = if scale.is_null() || w.chance(50) { sum.cast_mut() } else { scale.cast_mut() };
                    expect.argument("grad_factor");
                }
                0 => (handle, ()) = (self.context_handle(i, true, w), expect.handle("context")),
                1 => (sum, ()) = (std::ptr::null(), expect.argument("sum_of_squares")),
                2 => (sum, ()) = (sum.wrapping_byte_add(4), expect.argument("sum_of_squares")),
                3 => {
                    scale = self.memory.pointer::<f64>(two).wrapping_byte_add(1);
                    expect.argument("loss_scale");
                }
                4 => (max_norm, ()) = (w.pick(&[0.0, -1.0, f64::NAN, f64::NEG_INFINITY]), expect.argument("max_norm")),
                5 => (factor, ()) = (std::ptr::null_mut(), expect.argument("grad_factor")),
                _ => (factor, ()) = (factor.wrapping_byte_add(2), expect.argument("grad_factor")),
            }
        }
        let mut writes = Writes::default();
        writes.bytes(to, 8);
        call!(
            self,
            expect,
            writes,
            adalora_context_gradient_factor(
                handle.map(|h| h.as_ref()),
                sum,
                scale,
                max_norm,
                factor,
                std::ptr::null_mut()
            )
        )
        .map(drop)
    }

    /// A call that returns nothing, and leaves a refusal in the last error.
    pub(super) fn perform_void(&mut self, name: &'static str, expect: Expect, call: impl FnOnce()) -> Outcome {
        let refused = !expect.is_success();
        self.perform(name, expect, Writes::default(), || {
            let before = super::last_error();
            call();
            let after = super::last_error();
            // The text is the only sign; an earlier refusal of the same kind may have left the same one.
            if refused || after != before { crate::abi::status::ADALORA_ERROR_INVALID_HANDLE } else { 0 }
        })
        .map(drop)
    }
}
