//! AdaLoRA for any trainer: SVD adapters `W + B diag(E) A` whose ranks are reallocated during training, behind a C ABI.
//!
//! There is no Rust API: the interface is `include/adalora.h`, generated from the documentation in [`abi`]. Data flows
//! one way:
//!
//! | module | what it is |
//! | --- | --- |
//! | `abi` | the C functions and nothing else: check, convert, call, report |
//! | [`context`], [`adapter`], [`allocator`] | the objects behind the handles: they check every shape and hold no buffer's contents |
//! | [`optimizer`], [`regularizer`], [`philox`], [`rounding`], `allocator::{schedule, importance, selection}` | AdaLoRA's arithmetic, knowing no backend and no pointer |
//! | [`checkpoint`] | adapters in PEFT's files, training state beside them, the allocator's state as bytes |
//! | [`backend`] | the operations that the objects ask for, and who computes them |
//! | [`tensor`], [`error`] | the words that all of them share |

// Only the boundary and the backends may touch memory that is not theirs.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod abi;
pub mod adapter;
pub mod allocator;
#[allow(unsafe_code)]
pub mod backend;
pub mod checkpoint;
pub mod context;
pub mod error;
pub mod optimizer;
pub mod philox;
pub mod regularizer;
pub mod rounding;
pub mod tensor;

/// `major << 16 | minor << 8 | patch` of the package.
pub(crate) const VERSION: u32 = {
    const fn number(text: &str) -> u32 {
        let (bytes, mut i, mut n) = (text.as_bytes(), 0, 0);
        while i < bytes.len() {
            n = n * 10 + (bytes[i] - b'0') as u32;
            i += 1;
        }
        n
    }
    number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | number(env!("CARGO_PKG_VERSION_PATCH"))
};
