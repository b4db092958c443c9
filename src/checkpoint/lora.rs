//! AdaLoRA's adapters as plain LoRA: E and the scaling go into B.
//!
//! All get the largest live rank, filled up with zeros, and the multiplier 1: so the files need no rank pattern, which
//! not every program that reads LoRA knows.

use super::adapters::{PREFIX, Source};
use super::config;
use super::tensors::{Entry, stored};
use crate::error::{At, Error, Result, reserve};
use crate::tensor::Dtype;
use std::io::{self, ErrorKind, Write};

/// The adapters, and how they are written.
pub struct Lora<'s, 'a> {
    /// `adapter_config.json`.
    pub config: String,
    adapters: Vec<Plain<'s, 'a>>,
    r: usize,
}

struct Plain<'s, 'a> {
    source: &'s Source<'a>,
    /// Row of A, and what column of B is multiplied by, for each live triplet.
    live: Vec<(usize, f64)>,
}

impl<'s, 'a> Lora<'s, 'a> {
    /// Folds E and the scaling.
    pub fn new(text: &str, sources: &'s [Source<'a>]) -> Result<Self> {
        let mut adapters = reserve(sources.len(), "adapters")?;
        for (i, source) in sources.iter().enumerate() {
            let mut live = source.kept_rows().at_index("adapters", i)?;
            live.retain(|(_, e)| *e != 0.0);
            adapters.push(Plain { source, live });
        }
        // Rank 0 is not LoRA's.
        let r = adapters.iter().map(|adapter| adapter.live.len()).max().unwrap_or(0).max(1);
        let (config, own) = config::for_lora(text, sources, r)?;
        for adapter in &mut adapters {
            let scaling = if adapter.source.scaling == 0.0 { own } else { adapter.source.scaling };
            adapter.live.iter_mut().for_each(|(_, e)| *e *= scaling);
        }
        Ok(Self { config, adapters, r })
    }

    /// The tensors of the file.
    pub fn entries(&self) -> Result<Vec<Entry<'_>>> {
        let mut entries = reserve(2 * self.adapters.len(), "tensors")?;
        for (i, Plain { source, live }) in self.adapters.iter().enumerate() {
            let (r, a, b) = (self.r, &source.a, &source.b);
            // Half precision would round the product of three numbers a second time.
            let [a_type, b_type] = [a.dtype, b.dtype].map(Dtype::compute);
            let (mut a_shape, mut b_shape) = (vec![r], vec![b.rows, r]);
            let field: usize = source.kernel.iter().product();
            if field == 0 || !a.columns.is_multiple_of(field) {
                let name = format!("adapters[{i}].kernel");
                let expected = format!("extents whose product divides the {} columns of A", a.columns);
                return Err(Error::argument(name, format_args!("{:?}", source.kernel), expected));
            }
            a_shape.push(a.columns / field);
            a_shape.extend(&source.kernel);
            b_shape.extend(source.kernel.iter().map(|_| 1));
            let entry = |factor, dtype, shape, content| Entry {
                name: match source.embedding {
                    true => format!("{PREFIX}{}.lora_embedding_{factor}", source.name),
                    false => format!("{PREFIX}{}.lora_{factor}.weight", source.name),
                },
                dtype: stored(dtype),
                shape,
                content,
            };
            entries.push(entry(
                'A',
                a_type,
                a_shape,
                Box::new(move |to: &mut dyn Write| {
                    let mut row = zeros(a.columns * a_type.size())?;
                    for k in 0..r {
                        match live.get(k) {
                            Some((i, _)) => a.read(*i, a_type, &mut row),
                            None => row.fill(0),
                        }
                        to.write_all(&row)?;
                    }
                    Ok(())
                }),
            ));
            entries.push(entry(
                'B',
                b_type,
                b_shape,
                Box::new(move |to: &mut dyn Write| {
                    let mut row = zeros(r * b_type.size())?;
                    for i in 0..b.rows {
                        for ((k, factor), place) in live.iter().zip(row.chunks_exact_mut(b_type.size())) {
                            super::adapters::encode(b.value(i, *k) * factor, b_type, place);
                        }
                        to.write_all(&row)?;
                    }
                    Ok(())
                }),
            ));
        }
        Ok(entries)
    }
}

fn zeros(bytes: usize) -> io::Result<Vec<u8>> {
    let mut zeros = reserve(bytes, "bytes").map_err(|_| ErrorKind::OutOfMemory)?;
    zeros.resize(bytes, 0);
    Ok(zeros)
}
