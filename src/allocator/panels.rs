//! Which whole columns of each factor this process owns: what Gram matrices and orthogonality are computed from.

use super::Model;
use super::binding::{Factor, Slice};
use crate::error::{Result, out_of_memory, reserve};

/// Some whole columns of a factor P, where P is A, or B transposed: for each of its rank rows, where they begin.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Position of the adapter.
    pub adapter: usize,
    /// A or B.
    pub factor: Factor,
    /// Number of columns.
    pub columns: usize,
    /// Another process counts them.
    pub replica: bool,
    /// Slice and element in it at which each row begins: one for each row of A; for B, whose rows lie across, one for
    /// all.
    pub rows: Vec<(usize, usize)>,
}

/// All panels, by adapter and factor; or why there are none: a column that is owned only in part.
pub type Panels = std::result::Result<Vec<Panel>, String>;

/// The panels of sorted slices.
pub fn panels(model: &Model, slices: &[Slice]) -> Result<Panels> {
    let mut panels = reserve(slices.len(), "panels")?;
    let mut first = 0;
    for adapter in 0..model.geometries.len() {
        for factor in [Factor::A, Factor::E, Factor::B] {
            let n = slices[first..].iter().take_while(|s| (s.adapter, s.factor) == (adapter, factor)).count();
            let own = first..first + n;
            first += n;
            let partial = match factor {
                Factor::A => columns_of_a(model, adapter, slices, own, &mut panels)?,
                Factor::E => None,
                Factor::B => rows_of_b(model, adapter, slices, own, &mut panels)?,
            };
            if let Some(text) = partial {
                return Ok(Err(text));
            }
        }
    }
    Ok(Ok(panels))
}

/// Rows of B lie without gaps, so that a slice of whole rows is a panel.
fn rows_of_b(
    model: &Model,
    adapter: usize,
    slices: &[Slice],
    own: std::ops::Range<usize>,
    panels: &mut Vec<Panel>,
) -> Result<Option<String>> {
    let rank = model.geometries[adapter].rank;
    for i in own.filter(|i| !slices[*i].is_empty()) {
        let slice = &slices[i];
        if !(slice.begin.is_multiple_of(rank) && slice.end.is_multiple_of(rank)) {
            return Ok(Some(format!(
                "slices[{}]: found elements {} to {} of B of adapter {adapter}, expected whole rows of {rank} elements \
                 for Gram matrices and orthogonality",
                slice.index, slice.begin, slice.end
            )));
        }
        let mut rows = reserve(1, "rows")?;
        rows.push((i, 0));
        let columns = slice.len() / rank;
        push(panels, Panel { adapter, factor: Factor::B, columns, replica: slice.replica, rows })?;
    }
    Ok(None)
}

fn push(panels: &mut Vec<Panel>, panel: Panel) -> Result<()> {
    panels.try_reserve(1).map_err(|_| out_of_memory(panels.len() + 1, "panels"))?;
    panels.push(panel);
    Ok(())
}

/// A part of a row of A.
struct Piece {
    row: usize,
    /// First column, and one past the last.
    begin: usize,
    end: usize,
    slice: usize,
    /// Where it begins in the slice.
    element: usize,
}

/// Columns of A lie across its rows, and slices cut rows anywhere: between two neighbouring cuts each row is owned or not.
fn columns_of_a(
    model: &Model,
    adapter: usize,
    slices: &[Slice],
    own: std::ops::Range<usize>,
    panels: &mut Vec<Panel>,
) -> Result<Option<String>> {
    let (rank, features) = (model.geometries[adapter].rank, model.geometries[adapter].input.whole);
    let mut pieces: Vec<Piece> = reserve(own.len() + rank, "pieces of rows")?;
    for i in own {
        let mut at = slices[i].begin;
        while at < slices[i].end {
            let row = at / features;
            let end = slices[i].end.min((row + 1) * features);
            let (begin, element) = (at - row * features, at - slices[i].begin);
            pieces.push(Piece { row, begin, end: end - row * features, slice: i, element });
            at = end;
        }
    }
    let mut cuts: Vec<usize> = reserve(2 * pieces.len(), "cuts")?;
    cuts.extend(pieces.iter().flat_map(|p| [p.begin, p.end]));
    cuts.sort_unstable();
    cuts.dedup();
    // The piece of each row at which the next cut is looked for.
    let mut next: Vec<usize> = reserve(rank, "rows")?;
    next.extend((0..rank).map(|row| pieces.partition_point(|p| p.row < row)));
    for cut in cuts.windows(2) {
        let (begin, end) = (cut[0], cut[1]);
        let (mut rows, mut replicas) = (reserve(rank, "rows")?, 0);
        for (row, next) in next.iter_mut().enumerate() {
            while pieces.get(*next).is_some_and(|p| p.row == row && p.end <= begin) {
                *next += 1;
            }
            if let Some(piece) = pieces.get(*next).filter(|p| p.row == row && p.begin <= begin) {
                rows.push((piece.slice, piece.element + begin - piece.begin));
                replicas += usize::from(slices[piece.slice].replica);
            }
        }
        if rows.is_empty() {
            continue;
        }
        if rows.len() != rank || (replicas != 0 && replicas != rank) {
            return Ok(Some(format!(
                "slices: found {} of {rank} rows ({replicas} of them replicas) for columns {begin} to {end} of A of \
                 adapter {adapter}, expected whole columns for Gram matrices and orthogonality",
                rows.len()
            )));
        }
        let replica = replicas > 0;
        push(panels, Panel { adapter, factor: Factor::A, columns: end - begin, replica, rows })?;
    }
    Ok(None)
}
