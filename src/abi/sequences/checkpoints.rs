//! Calls on checkpoints, and files that are damaged.

use super::adapters::DTYPES;
use super::memory::{Fill, Mat, Writes, bytes_of};
use super::{Choices, Expect, Outcome, World, call, ensure, last_error};
use crate::abi::checkpoint::{Checkpoint as Handle, *};
use crate::abi::status::*;
use crate::abi::types::*;
use crate::checkpoint::{ADAPTER_FILE, CONFIG_FILE, STATE_FILE};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::fs;
use std::mem::{MaybeUninit, offset_of};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what a thread takes.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static MOST_HELD: Cell<usize> = const { Cell::new(0) };
}

fn count(taken: usize, freed: usize) {
    // A thread that is ending may have no counter any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get().wrapping_add(taken).wrapping_sub(freed));
        let _ = MOST_HELD.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: the system's allocator, with counters beside it that do not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// A folder that goes with its caller.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("adalora-sequences-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An adapter as it is to come back.
struct Adapter {
    name: String,
    rank: usize,
    kept: Vec<bool>,
    input: usize,
    output: usize,
    dtypes: [DtypeCode; 3],
    /// A, E and B, row by row, with masked triplets in their places: as they were written, or 0.
    values: [Vec<f64>; 3],
}

impl Adapter {
    fn n_kept(&self) -> usize {
        self.kept.iter().filter(|kept| **kept).count()
    }
}

struct Tensor {
    name: String,
    dtype: DtypeCode,
    shape: Vec<i64>,
    bytes: Vec<u8>,
}

/// What a caller knows of its files.
#[derive(Clone, Default)]
pub(super) struct Files {
    adapter: Option<Rc<(Vec<Adapter>, Vec<Tensor>)>>,
    state: Option<Rc<(String, Vec<Tensor>)>>,
}

/// A checkpoint of the caller's.
pub(super) struct Checkpoint {
    pub(super) handle: *mut Handle,
    files: i32,
    holds: Files,
}

fn size_of_code(code: DtypeCode) -> usize {
    match code {
        ADALORA_FLOAT64 | ADALORA_INT64 | ADALORA_UINT64 | ADALORA_COMPLEX64 => 8,
        ADALORA_FLOAT32 | ADALORA_INT32 | ADALORA_UINT32 => 4,
        ADALORA_FLOAT16 | ADALORA_BFLOAT16 | ADALORA_INT16 | ADALORA_UINT16 => 2,
        _ => 1,
    }
}

/// The same value, or both not a number.
fn same(a: f64, b: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}

impl World {
    fn path(&self) -> PathBuf {
        self.folder.0.clone()
    }

    /// The folder's path, which every caller has its own of.
    fn folder_text(&mut self, c: &mut Choices) -> *const c_char {
        let text = [self.path().as_os_str().as_bytes(), b"\0"].concat();
        let place = self.memory.private(text.len(), 1, c);
        self.memory.write(place, &text);
        self.memory.pointer::<c_char>(place)
    }

    fn text(&mut self, text: &[u8], c: &mut Choices) -> *const c_char {
        let place = self.memory.bytes(&[text, b"\0"].concat(), 1, c);
        self.memory.pointer::<c_char>(place)
    }

    fn some_tensors(&mut self, prefix: &str, c: &mut Choices) -> (Vec<Tensor>, Vec<crate::abi::types::Tensor>) {
        let mut list: Vec<Tensor> = (0..c.pick(&[0, 0, 1, 3]))
            .map(|i| {
                let dtype = 1 + c.below(19) as i32;
                let shape: Vec<i64> = (0..c.below(4)).map(|_| c.pick(&[0, 1, 2, 3])).collect();
                let n = shape.iter().product::<i64>() as usize * size_of_code(dtype);
                let bytes = (0..n).map(|_| c.below(256) as u8).collect();
                Tensor { name: format!("{prefix}{}.\u{e9}\"{i}", c.below(9)), dtype, shape, bytes }
            })
            .collect();
        let descriptors = list
            .iter()
            .map(|tensor| {
                let extents: Vec<[u8; 8]> = tensor.shape.iter().map(|d| d.to_le_bytes()).collect();
                let shape = self.memory.values(&extents, 8, c);
                let data = self.memory.bytes(&tensor.bytes, 1, c);
                crate::abi::types::Tensor {
                    struct_size: 0,
                    name: self.text(tensor.name.as_bytes(), c),
                    data: self.memory.pointer::<c_void>(data),
                    shape: self.memory.pointer(shape),
                    n_dims: tensor.shape.len() as i64,
                    bytes: if c.chance(50) { 0 } else { tensor.bytes.len() },
                    dtype: tensor.dtype,
                    reserved: 0,
                }
            })
            .collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        (list, descriptors)
    }

    fn some_adapters(&mut self, c: &mut Choices) -> (Vec<Adapter>, Vec<AdapterEntry>) {
        let rank = c.pick(&[0usize, 1, 2, 3, 5]);
        let is_cut = c.chance(50);
        let mut list = Vec::new();
        let mut entries = Vec::new();
        for i in 0..c.pick(&[0, 1, 2, 3]) {
            let (input, output) = (1 + c.below(9), 1 + c.below(9));
            let dtypes = [c.pick(&DTYPES), c.pick(&DTYPES), c.pick(&DTYPES)];
            let has_pattern = is_cut && c.chance(70);
            let kept: Vec<bool> = (0..rank).map(|_| !has_pattern || c.chance(60)).collect();
            let n_kept = kept.iter().filter(|kept| **kept).count();
            let held = if has_pattern && c.chance(50) { n_kept } else { rank };
            let fill = Fill::some(c);
            let a = self.memory.matrix(held as i64, input as i64, dtypes[0], fill, c);
            let e = self.memory.matrix(held as i64, 1, dtypes[1], fill, c);
            let b = self.memory.matrix(output as i64, held as i64, dtypes[2], fill, c);
            // Which row of what is held each triplet has.
            let mut next = 0;
            let rows: Vec<Option<usize>> = (0..rank)
                .map(|r| {
                    let there = kept[r].then_some(if held == rank { r } else { next });
                    next += usize::from(kept[r]);
                    there
                })
                .collect();
            if held == rank {
                for (r, kept) in kept.iter().enumerate().filter(|(_, kept)| !**kept) {
                    debug_assert!(!kept);
                    self.memory.write_element(e.place, r * e.pitch(), dtypes[1], 0.0);
                }
            }
            let [va, ve, vb] = [&a, &e, &b].map(|mat| self.memory.matrix_elements(mat));
            let of = |values: &[f64], row: Option<usize>, width, k| row.map_or(0.0, |row| values[row * width + k]);
            let values = [
                (0..rank * input).map(|i| of(&va, rows[i / input], input, i % input)).collect(),
                rows.iter().map(|row| of(&ve, *row, 1, 0)).collect(),
                (0..output * rank).map(|i| rows[i % rank].map_or(0.0, |k| vb[i / rank * held + k])).collect(),
            ];
            let flags: Vec<[u8; 1]> =
                kept.iter().map(|kept| [if *kept { 1 + c.below(255) as u8 } else { 0 }]).collect();
            let pattern = self.memory.values(&flags, 1, c);
            let name = format!("m{i}.{}", c.pick(&["q", "layers.0", "../x", "\u{fc}"]));
            entries.push(AdapterEntry {
                struct_size: 0,
                name: self.text(name.as_bytes(), c),
                params: Triplets { A: a.d, E: e.d, B: b.d },
                rank: rank as i64,
                pattern: if has_pattern { self.memory.pointer(pattern) } else { std::ptr::null() },
                scaling: 0.0,
                kernel: std::ptr::null(),
                n_kernel: 0,
                embedding: 0,
                reserved: 0,
            });
            list.push(Adapter { name, rank, kept, input, output, dtypes, values });
        }
        list.sort_by(|a, b| a.name.cmp(&b.name));
        (list, entries)
    }

    pub(super) fn write_checkpoint(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let (adapters, mut entries) = self.some_adapters(c);
        let (beside, mut tensors) = self.some_tensors("base_model.model.", c);
        let (of_state, mut state_tensors) = self.some_tensors("", c);
        let mut expect = Expect::default();
        let has_adapter = !entries.is_empty() || !tensors.is_empty() || c.chance(50);
        let has_state = !state_tensors.is_empty() || !has_adapter || c.chance(30);
        let init_r = entries.first().map_or(3, |entry| entry.rank);
        let config = format!("{{\"init_r\": {init_r}, \"lora_alpha\": {}, \"x\": [1e-7]}}", c.pick(&["0", "2.5"]));
        let state = c.pick(&["", "a text", "{\"\u{e9}\": 1}"]);
        let mut d = CheckpointDesc {
            struct_size: 0,
            folder: self.folder_text(c),
            config: if has_adapter { self.text(config.as_bytes(), c) } else { std::ptr::null() },
            adapters: std::ptr::null(),
            adapter_stride: 0,
            n_adapters: 0,
            tensors: std::ptr::null(),
            tensor_stride: 0,
            n_tensors: 0,
            state: if has_state { self.text(state.as_bytes(), c) } else { std::ptr::null() },
            state_tensors: std::ptr::null(),
            state_tensor_stride: 0,
            n_state_tensors: 0,
        };
        let (mut null, mut desc_size, mut entry_size, mut tensor_size) = (false, None, None, None);
        if let Some(w) = w {
            let i = w.below(entries.len().max(1));
            match w.below(14) {
                0 => (null, ()) = (true, expect.argument("desc")),
                1 => (desc_size, ()) = (Some(0), ()),
                2 => (d.folder, ()) = (std::ptr::null(), expect.argument("desc.folder")),
                3 if has_adapter => {
                    d.config = self.text(w.pick(&["{", "[]", "", "{\"lora_alpha\": \"8\"}"]).as_bytes(), w);
                    expect.argument("desc.config");
                }
                4 if has_adapter && (!entries.is_empty() || !tensors.is_empty()) => {
                    (d.config, ()) = (std::ptr::null(), expect.argument("desc.config"));
                }
                5 if !entries.is_empty() => (entry_size, ()) = (Some(i), ()),
                6 if !tensors.is_empty() => (tensor_size, ()) = (Some(w.below(tensors.len())), ()),
                7 if !entries.is_empty() => {
                    entries[i].rank = w.pick(&[-1, i64::MAX, entries[i].rank + 7]);
                    entries[i].pattern = std::ptr::null();
                    expect.argument(format!("adapters[{i}].rank"));
                }
                8 if !entries.is_empty() => {
                    (entries[i].name, ()) = (std::ptr::null(), expect.argument(format!("adapters[{i}].name")));
                }
                9 if !entries.is_empty() => {
                    let (name, field) = w.pick(&[("scaling", 0), ("embedding", 1), ("n_kernel", 2), ("reserved", 3)]);
                    match field {
                        0 => entries[i].scaling = w.pick(&[1.0, f64::NAN]),
                        1 => entries[i].embedding = w.pick(&[1, 2]),
                        2 => entries[i].n_kernel = w.pick(&[-1, 4]),
                        _ => entries[i].reserved = 1,
                    }
                    expect.argument(format!("adapters[{i}].{name}"));
                }
                10 if !tensors.is_empty() => {
                    let k = w.below(tensors.len());
                    let (name, field) =
                        w.pick(&[("dtype", 0), ("n_dims", 1), ("bytes", 2), ("name", 3), ("reserved", 4)]);
                    match field {
                        0 => tensors[k].dtype = w.pick(&[0, 20, -1]),
                        1 => tensors[k].n_dims = w.pick(&[-1, 65]),
                        2 => tensors[k].bytes = 1 << 40,
                        3 => tensors[k].name = std::ptr::null(),
                        _ => tensors[k].reserved = 1,
                    }
                    expect.argument(format!("tensors[{k}].{name}"));
                }
                11 if tensors.len() > 1 => {
                    (tensors[1].name, ()) = (tensors[0].name, expect.argument("tensors"));
                }
                12 if !state_tensors.is_empty() => {
                    (d.state, ()) = (std::ptr::null(), expect.argument("desc.state"));
                }
                _ => {
                    (d.n_state_tensors, ()) = (-1, expect.argument("number of state_tensors"));
                }
            }
        }
        let entries: Vec<Vec<u8>> = entries.iter().map(bytes_of).collect();
        let minimum = offset_of!(AdapterEntry, rank) + 8;
        let (place, stride, wrong) = self.memory.descriptors(&entries, minimum, entry_size, c);
        (d.adapters, d.adapter_stride) = (self.memory.pointer(place), stride);
        d.n_adapters = entries.len() as i64;
        if let Some(i) = entry_size {
            expect.argument(format!("adapters[{i}]{wrong}"));
        }
        let minimum = offset_of!(crate::abi::types::Tensor, dtype) + 4;
        let lists = [(&mut tensors, tensor_size), (&mut state_tensors, None)].map(|(list, spoilt)| {
            let list: Vec<Vec<u8>> = list.iter().map(bytes_of).collect();
            (self.memory.descriptors(&list, minimum, spoilt, c), list.len() as i64)
        });
        let [((place, stride, wrong), n), ((state_place, state_stride, _), state_n)] = lists;
        (d.tensors, d.tensor_stride, d.n_tensors) = (self.memory.pointer(place), stride, n);
        if let Some(i) = tensor_size {
            expect.argument(format!("tensors[{i}]{wrong}"));
        }
        (d.state_tensors, d.state_tensor_stride) = (self.memory.pointer(state_place), state_stride);
        if d.n_state_tensors == 0 {
            d.n_state_tensors = state_n;
        }
        let minimum = offset_of!(CheckpointDesc, config) + 8;
        let (place, _, wrong) = self.memory.descriptors(&[bytes_of(&d)], minimum, desc_size, c);
        if desc_size.is_some() {
            expect.argument(format!("desc{wrong}"));
        }
        let desc = if null { std::ptr::null() } else { self.memory.pointer::<CheckpointDesc>(place).cast_const() };
        let before = self.listing();
        if call!(self, expect, Writes::default(), adalora_checkpoint_write(desc))? {
            if has_adapter {
                self.files.adapter = Some(Rc::new((adapters, beside)));
            }
            if has_state {
                self.files.state = Some(Rc::new((state.to_owned(), of_state)));
            }
            let expected = usize::from(self.files.adapter.is_some()) * 2 + usize::from(self.files.state.is_some());
            ensure!(self.listing().len() == expected, "files {:?}", self.listing());
        } else {
            ensure!(self.listing() == before, "a refused call changed the files {before:?} to {:?}", self.listing());
        }
        Ok(())
    }

    /// The files, and how long they are.
    fn listing(&self) -> Vec<(PathBuf, u64)> {
        let Ok(folder) = fs::read_dir(self.path()) else { return Vec::new() };
        let files = folder.filter_map(|entry| entry.ok()).filter(|entry| entry.path().is_file());
        let mut list: Vec<_> = files.map(|file| (file.path(), file.metadata().map_or(0, |m| m.len()))).collect();
        list.sort();
        list
    }

    pub(super) fn open_checkpoint(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let path = self.path();
        let mut folder = self.folder_text(c);
        let mut files = c.pick(&[ADALORA_FILES_ADAPTER, ADALORA_FILES_STATE, ADALORA_FILES_ALL]);
        let mut expect = Expect::default();
        let slot = self.slot(c);
        let mut pointer = NonNull::new(self.memory.pointer::<MaybeUninit<*mut Handle>>(slot));
        let missing = [(ADALORA_FILES_ADAPTER, self.files.adapter.is_none(), CONFIG_FILE)]
            .into_iter()
            .chain([(ADALORA_FILES_STATE, self.files.state.is_none(), STATE_FILE)])
            .find(|(part, missing, _)| files & part != 0 && *missing);
        if let Some(w) = w {
            match w.below(3) {
                0 => (folder, ()) = (std::ptr::null(), expect.argument("folder")),
                1 => (files, ()) = (w.pick(&[0, 4, -1]), expect.argument("files")),
                _ => (pointer, ()) = (None, expect.argument("checkpoint")),
            }
        } else if let Some((_, _, name)) = missing {
            expect.refuse(ADALORA_ERROR_NOT_FOUND, [path.join(name).to_string_lossy().into_owned()]);
        }
        let mut writes = Writes::default();
        writes.bytes(slot, 8);
        if call!(self, expect, writes, adalora_checkpoint_open(folder, files, pointer.map(|mut p| p.as_mut())))? {
            self.checkpoints.push(Checkpoint { handle: self.handle_at(slot), files, holds: self.files.clone() });
        }
        Ok(())
    }

    pub(super) fn destroy_checkpoint(&mut self, c: &mut Choices, spoil: bool) -> Outcome {
        if self.checkpoints.is_empty() {
            return Ok(());
        }
        let i = c.below(self.checkpoints.len());
        let other = self.contexts.first().and_then(|context| NonNull::new(context.handle));
        let (mut handle, mut expect) = (NonNull::new(self.checkpoints[i].handle), Expect::default());
        match (spoil, other) {
            (true, Some(other)) => (handle, ()) = (Some(other.cast()), expect.handle("checkpoint")),
            (true, None) => handle = None,
            _ => drop(self.checkpoints.swap_remove(i)),
        }
        self.perform_void("adalora_checkpoint_destroy", expect, || {
            // SAFETY: a live handle that is given up, or null, or one of another kind.
            unsafe { adalora_checkpoint_destroy(handle) }
        })
    }

    /// Reads one thing of a checkpoint, which may have other files than those that are there by now.
    pub(super) fn read_checkpoint(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        if self.checkpoints.is_empty() {
            return self.open_checkpoint(c, None);
        }
        let i = c.below(self.checkpoints.len());
        let Checkpoint { handle, files, holds } = &self.checkpoints[i];
        let (handle, files, holds) = (*handle, *files, holds.clone());
        let part = if files == ADALORA_FILES_ALL { 1 + c.below(2) as i32 } else { files };
        let mut given = Some(handle.cast_const());
        let mut asked = part;
        let mut expect = Expect::default();
        let mut spoils_rest = false;
        let mut w = w;
        if let Some(w) = w.as_deref_mut() {
            match w.below(4) {
                0 => (given, ()) = (None, expect.handle("checkpoint")),
                1 => (asked, ()) = (w.pick(&[0, 3, -1]), expect.argument("files")),
                2 if files != ADALORA_FILES_ALL => (asked, ()) = (3 - part, expect.state("checkpoint")),
                _ => spoils_rest = true,
            }
        }
        // SAFETY: a live handle, or null.
        let shared = given.and_then(|handle| unsafe { handle.as_ref() });
        let empty = Vec::new();
        let adapters = holds.adapter.as_ref().map_or(&empty, |held| &held.0);
        let of_adapter = part == ADALORA_FILES_ADAPTER;
        if of_adapter && c.chance(50) && !adapters.is_empty() {
            if asked != part {
                // These functions read the adapter's files alone.
                return Ok(());
            }
            return self.read_adapter(shared, expect, adapters, w.filter(|_| spoils_rest), c);
        }
        let no_tensors = Vec::new();
        let tensors = match of_adapter {
            true => holds.adapter.as_ref().map_or(&no_tensors, |held| &held.1),
            false => holds.state.as_ref().map_or(&no_tensors, |held| &held.1),
        };
        if tensors.is_empty() || c.chance(40) {
            if spoils_rest {
                return Ok(());
            }
            let place = self.memory.place(16, 8, c);
            let [n_adapters, n_tensors] = [0, 8].map(|at| self.memory.pointer::<MaybeUninit<i64>>(place.offset(at)));
            let mut writes = Writes::default();
            writes.bytes(place, 16);
            let sized = call!(
                self,
                expect,
                writes,
                adalora_checkpoint_sizes(shared, asked, Some(&mut *n_adapters), Some(&mut *n_tensors))
            )?;
            if sized {
                let found = [self.memory.read_i64(place, 0), self.memory.read_i64(place, 1)];
                let expected = [if of_adapter { adapters.len() } else { 0 } as i64, tensors.len() as i64];
                ensure!(found == expected, "sizes {found:?}, expected {expected:?}");
                return self.read_text(handle, part, &holds, c);
            }
            return Ok(());
        }
        let k = c.below(tensors.len());
        let expected = &tensors[k];
        let mut index = k as i64;
        let mut room = expected.bytes.len();
        if let Some(w) = w.filter(|_| spoils_rest) {
            match w.below(2) {
                0 => (index, ()) = (w.pick(&[-1, tensors.len() as i64]), expect.argument("index")),
                _ => (room, ()) = (room + 1, expect.argument("bytes")),
            }
        }
        let to = self.memory.place(room, 1, c);
        let data = self.memory.pointer::<c_void>(to);
        let mut writes = Writes::default();
        writes.bytes(to, room);
        if call!(self, expect, writes, adalora_checkpoint_read_tensor(shared, asked, index, data, room))? {
            ensure!(self.memory.read(to, room) == expected.bytes, "{} came back changed", expected.name);
            let mut info: crate::abi::types::Tensor = unsafe_zeroed();
            info.struct_size = size_of_val(&info);
            // SAFETY: a live handle, and a structure with its size.
            let status = unsafe { adalora_checkpoint_tensor(handle.as_ref(), part, index, &mut info) };
            ensure!(status == ADALORA_SUCCESS, "{}", last_error());
            // SAFETY: what a live checkpoint says.
            let (name, shape) = unsafe { (CStr::from_ptr(info.name), numbers(info.shape, info.n_dims)) };
            ensure!(name.to_bytes() == expected.name.as_bytes(), "{name:?}, expected {}", expected.name);
            ensure!(shape == expected.shape && info.dtype == expected.dtype, "{}: {shape:?}", expected.name);
            ensure!(info.bytes == expected.bytes.len() && info.data.is_null(), "{}", expected.name);
        }
        Ok(())
    }

    fn read_text(&mut self, handle: *mut Handle, part: i32, holds: &Files, c: &mut Choices) -> Outcome {
        let size = self.memory.private(8, 8, c);
        self.memory.write(size, &[0; 8]);
        let bytes = self.memory.pointer::<usize>(size);
        let mut writes = Writes::default();
        writes.even_if_refused(size, 8);
        let nothing = std::ptr::null_mut();
        call!(
            self,
            Expect::default(),
            writes,
            adalora_checkpoint_text(handle.as_ref(), part, nothing, Some(&mut *bytes))
        )?;
        let needed = self.memory.read_i64(size, 0) as usize;
        let place = self.memory.private(needed, 1, c);
        let text = self.memory.pointer::<c_char>(place);
        let mut writes = Writes::default();
        writes.bytes(place, needed);
        writes.even_if_refused(size, 8);
        call!(
            self,
            Expect::default(),
            writes,
            adalora_checkpoint_text(handle.as_ref(), part, text, Some(&mut *bytes))
        )?;
        let found = self.memory.read(place, needed - 1);
        match &holds.state {
            Some(state) if part == ADALORA_FILES_STATE => {
                ensure!(found == state.0.as_bytes(), "another text than {:?}", state.0);
            }
            _ => ensure!(found.starts_with(b"{\n  \"init_r\": "), "{:?}", String::from_utf8_lossy(found)),
        }
        Ok(())
    }

    fn read_adapter(
        &mut self,
        handle: Option<&Handle>,
        mut expect: Expect,
        adapters: &[Adapter],
        w: Option<&mut Choices>,
        c: &mut Choices,
    ) -> Outcome {
        let k = c.below(adapters.len());
        let expected = &adapters[k];
        let is_whole = c.chance(60) || expected.n_kept() == expected.rank;
        let held = if is_whole { expected.rank } else { expected.n_kept() } as i64;
        let dtypes = if c.chance(50) { expected.dtypes } else { [(); 3].map(|()| c.pick(&DTYPES)) };
        let shapes = [(held, expected.input as i64), (held, 1), (expected.output as i64, held)];
        let mats: Vec<Mat> = shapes
            .iter()
            .zip(dtypes)
            .map(|((rows, columns), dtype)| self.memory.matrix(*rows, *columns, dtype, Fill::Plain, c))
            .collect();
        let mut params = Triplets { A: mats[0].d, E: mats[1].d, B: mats[2].d };
        let mut index = k as i64;
        if let Some(w) = w {
            match w.below(4) {
                0 => (index, ()) = (w.pick(&[-1, adapters.len() as i64]), expect.argument("index")),
                1 => {
                    // A stride of 0 means as many columns.
                    (params.A.columns, params.A.row_stride) = (params.A.columns + 1, 0);
                    expect.argument("params.A");
                }
                2 => (params.B.dtype, ()) = (w.pick(&[0, ADALORA_INT64]), expect.argument("params.B.dtype")),
                _ => (params.B.reserved, ()) = (1, expect.argument("params.B.reserved")),
            }
        }
        let mut writes = Writes::default();
        mats.iter().for_each(|mat| writes.matrix(mat));
        let place = self.memory.private(size_of::<Triplets>(), 8, c);
        self.memory.write(place, &bytes_of(&params));
        let address = self.memory.pointer::<Triplets>(place).cast_const();
        if !call!(self, expect, writes, adalora_checkpoint_read_adapter(handle, index, address))? {
            return Ok(());
        }
        let at: Vec<usize> = (0..expected.rank).filter(|r| is_whole || expected.kept[*r]).collect();
        let wanted = [
            at.iter().flat_map(|r| expected.values[0][r * expected.input..][..expected.input].to_vec()).collect(),
            at.iter().map(|r| expected.values[1][*r]).collect(),
            (0..expected.output)
                .flat_map(|o| at.iter().map(move |r| (o, *r)))
                .collect::<Vec<_>>()
                .iter()
                .map(|(o, r)| expected.values[2][o * expected.rank + r])
                .collect::<Vec<f64>>(),
        ];
        for ((mat, wanted), (from, to)) in mats.iter().zip(&wanted).zip(expected.dtypes.into_iter().zip(dtypes)) {
            let found = self.memory.matrix_elements(mat);
            let exact = from == to || to == ADALORA_FLOAT64 || (to == ADALORA_FLOAT32 && from != ADALORA_FLOAT64);
            let fits = |found: f64, wanted: f64| match exact {
                true => same(found, wanted),
                // Rounded to 8 bits or more, or to an infinity, or to nothing.
                false => {
                    same(found, wanted) || !found.is_finite() || (found - wanted).abs() <= wanted.abs() / 256.0 + 1e-7
                }
            };
            let differing = found.iter().zip(wanted).position(|(found, wanted)| !fits(*found, *wanted));
            ensure!(
                found.len() == wanted.len() && differing.is_none(),
                "{}: {found:?}, expected {wanted:?}",
                expected.name
            );
        }
        let mut info: AdapterInfo = unsafe_zeroed();
        info.struct_size = size_of_val(&info);
        // SAFETY: a structure with its size.
        let status = unsafe { adalora_checkpoint_adapter(handle, index, &mut info) };
        ensure!(status == ADALORA_SUCCESS, "{}", last_error());
        // SAFETY: what a live checkpoint says.
        let name = unsafe { CStr::from_ptr(info.name) };
        ensure!(name.to_bytes() == expected.name.as_bytes(), "{name:?}, expected {}", expected.name);
        let found = [info.rank, info.kept, info.in_features, info.out_features];
        let wanted = [expected.rank, expected.n_kept(), expected.input, expected.output].map(|n| n as i64);
        ensure!(found == wanted && [info.a_dtype, info.e_dtype, info.b_dtype] == expected.dtypes, "{found:?}");
        Ok(())
    }

    /// Opens files like the caller's with damage in them, and reads all that is found.
    pub(super) fn read_damaged(&mut self, c: &mut Choices) -> Outcome {
        if self.listing().is_empty() {
            return self.write_checkpoint(c, None);
        }
        let folder = self.path().join("damaged");
        fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let mut files = 0;
        let mut size = 0;
        let damaged = c.pick(&[CONFIG_FILE, ADAPTER_FILE, STATE_FILE]);
        for (name, part) in [
            (CONFIG_FILE, ADALORA_FILES_ADAPTER),
            (ADAPTER_FILE, ADALORA_FILES_ADAPTER),
            (STATE_FILE, ADALORA_FILES_STATE),
        ] {
            let Ok(mut bytes) = fs::read(self.path().join(name)) else { continue };
            files |= part;
            if name == damaged {
                (0..1 + c.below(4)).for_each(|_| damage(&mut bytes, c));
            }
            size += bytes.len();
            fs::write(folder.join(name), bytes).map_err(|e| e.to_string())?;
        }
        let path = CString::new(folder.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        let mut handle = MaybeUninit::<*mut Handle>::uninit();
        let before = HELD.get();
        MOST_HELD.set(before);
        // SAFETY: a text and a place for a handle.
        let status = unsafe { adalora_checkpoint_open(path.as_ptr(), files, Some(&mut handle)) };
        let taken = MOST_HELD.get().saturating_sub(before);
        ensure!(taken <= 40 * size + (1 << 16), "{taken} bytes were taken for files of {size}");
        self.statuses.push(status);
        self.trace.push(format!("{status} damaged files opened"));
        if status != ADALORA_SUCCESS {
            let known = [ADALORA_ERROR_CORRUPT_DATA, ADALORA_ERROR_INVALID_ARGUMENT, ADALORA_ERROR_UNSUPPORTED];
            ensure!(known.contains(&status), "status {status}: {}", last_error());
            return Ok(());
        }
        // SAFETY: written on success.
        let handle = unsafe { handle.assume_init() };
        let read = read_all(handle, files);
        // SAFETY: a live handle, given up.
        unsafe { adalora_checkpoint_destroy(NonNull::new(handle)) };
        read
    }
}

fn unsafe_zeroed<T: Copy>() -> T {
    // SAFETY: used for structures of integers and pointers alone.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// # Safety
/// `n` readable numbers.
unsafe fn numbers<'a>(from: *const i64, n: i64) -> &'a [i64] {
    // SAFETY: as this function asks; a vector's address is never null.
    unsafe { std::slice::from_raw_parts(from, n as usize) }
}

/// One change, of the kinds that find gaps in a parser.
fn damage(bytes: &mut Vec<u8>, c: &mut Choices) {
    if bytes.is_empty() {
        return;
    }
    let at = match c.chance(60) {
        // In the header, as a rule.
        true => c.below(bytes.len().min(400)),
        false => c.below(bytes.len()),
    };
    match c.below(7) {
        0 => bytes[at] ^= 1 << c.below(8),
        1 => bytes.truncate(at),
        2 => {
            bytes.insert(at, c.pick(b"0129[]{},:\"\\ue-+.F\xff\0"));
        }
        3 => {
            bytes.remove(at);
        }
        4 => {
            let length = c.pick(&[0u64, 1, 2, bytes.len() as u64, u64::MAX, 1 << 63, 1 << 40, 1 << 24]).to_le_bytes();
            let n = bytes.len().min(8);
            bytes[..n].copy_from_slice(&length[..n]);
        }
        5 => {
            // Another number, or a number in the place of something else.
            let digits = bytes[at..].iter().position(u8::is_ascii_digit).map(|i| at + i);
            if let Some(at) = digits {
                let number =
                    c.pick(&["0", "1", "7", "18446744073709551615", "9223372036854775808", "1e9", "-1", "4294967296"]);
                bytes.splice(at..at + 1, number.bytes());
            }
        }
        _ => {
            let from = c.below(bytes.len());
            let piece: Vec<u8> = bytes[from..].iter().take(1 + c.below(40)).copied().collect();
            bytes.splice(at..at, piece);
        }
    }
}

/// Reads everything that a checkpoint says it has.
fn read_all(handle: *mut Handle, files: i32) -> Outcome {
    // SAFETY: a live handle.
    let shared = unsafe { handle.as_ref() };
    let allowed = |status: i32, what: &str| match status {
        ADALORA_SUCCESS => Ok(()),
        _ => Err(format!("{what} of a checkpoint that was opened: status {status}, {}", last_error())),
    };
    for part in [ADALORA_FILES_ADAPTER, ADALORA_FILES_STATE] {
        if files & part == 0 {
            continue;
        }
        let (mut n_adapters, mut n_tensors) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: places for numbers.
        let status = unsafe { adalora_checkpoint_sizes(shared, part, Some(&mut n_adapters), Some(&mut n_tensors)) };
        allowed(status, "sizes")?;
        // SAFETY: written on success.
        let (n_adapters, n_tensors) = unsafe { (n_adapters.assume_init(), n_tensors.assume_init()) };
        for i in 0..n_adapters {
            let mut info: AdapterInfo = unsafe_zeroed();
            info.struct_size = size_of_val(&info);
            // SAFETY: a structure with its size.
            allowed(unsafe { adalora_checkpoint_adapter(shared, i, &mut info) }, "adapter")?;
            let (rank, input, output) = (info.rank, info.in_features, info.out_features);
            // Without a triplet, features cost nothing and may be many.
            let [a, b] = [rank * input, output * rank].map(|n| vec![0f32; n as usize]);
            let e = vec![0f32; rank as usize];
            let matrix = |data: &[f32], rows, columns| Matrix {
                data: data.as_ptr().cast_mut().cast(),
                rows,
                columns,
                row_stride: 0,
                dtype: ADALORA_FLOAT32,
                reserved: 0,
            };
            let params = Triplets { A: matrix(&a, rank, input), E: matrix(&e, rank, 1), B: matrix(&b, output, rank) };
            // SAFETY: room for the triplets.
            allowed(unsafe { adalora_checkpoint_read_adapter(shared, i, &params) }, "triplets")?;
        }
        for i in 0..n_tensors {
            let mut info: crate::abi::types::Tensor = unsafe_zeroed();
            info.struct_size = size_of_val(&info);
            // SAFETY: a structure with its size.
            allowed(unsafe { adalora_checkpoint_tensor(shared, part, i, &mut info) }, "tensor")?;
            let mut bytes = vec![0u8; info.bytes];
            let data = bytes.as_mut_ptr().cast();
            // SAFETY: room for the bytes.
            allowed(unsafe { adalora_checkpoint_read_tensor(shared, part, i, data, info.bytes) }, "elements")?;
        }
    }
    Ok(())
}
