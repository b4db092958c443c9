//! Which triplets stay: highest scores first, ties by lower adapter, then lower triplet.

use super::{BudgetUnit, Model};

/// Marks in `pattern` the triplets that stay. `order` is scratch; both are as long as `scores`, which are in the
/// model's order.
pub fn select(model: &Model, scores: &[f64], budget: i64, order: &mut [u64], pattern: &mut [u8]) {
    for (i, slot) in order.iter_mut().enumerate() {
        *slot = i as u64;
    }
    // A total order whatever a caller's scores hold; adding 0 makes -0 and 0 a tie.
    let falling = |a: &u64, b: &u64| (scores[*b as usize] + 0.0).total_cmp(&(scores[*a as usize] + 0.0)).then(a.cmp(b));
    let stay = match model.unit {
        BudgetUnit::Triplets => {
            let stay = usize::try_from(budget).unwrap_or(0).min(order.len());
            if 0 < stay && stay < order.len() {
                order.select_nth_unstable_by(stay - 1, falling);
            }
            stay
        }
        BudgetUnit::Parameters => {
            order.sort_unstable_by(falling);
            let mut spent = 0;
            order
                .iter()
                .take_while(|i| {
                    spent += model.cost_of_triplet(**i as usize);
                    spent <= budget
                })
                .count()
        }
    };
    pattern.fill(0);
    for i in &order[..stay] {
        pattern[*i as usize] = 1;
    }
}
