//! The C functions and nothing else: check, convert, call, report. One file per object; the documentation in them is
//! the header's.
//!
//! `guard` turns null handles, panics and errors into a status; `read` turns descriptors into checked values; `types`
//! are the descriptors themselves.

mod adapter;
mod allocator;
mod checkpoint;
mod context;
mod guard;
mod read;
#[cfg(test)]
mod sequences;
mod status;
mod types;
