//! The budget's schedule: constant, then falling with the third power, then constant.

/// When the budget falls, and from where to where.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Budget at the start.
    pub initial: i64,
    /// Budget at the end.
    pub target: i64,
    /// Steps before it begins to fall.
    pub tinit: i64,
    /// Step at which the last mask falls: `total_step - tfinal`.
    pub end: i64,
    /// Steps between masks.
    pub delta_t: i64,
}

impl Schedule {
    /// The budget at a step, and whether a mask falls on it.
    pub fn at(&self, step: i64) -> (i64, bool) {
        if step <= self.tinit {
            return (self.initial, false);
        }
        if step > self.end {
            return (self.target, true);
        }
        let left = 1.0 - (step - self.tinit) as f64 / (self.end - self.tinit) as f64;
        // pow and not two products: it rounds once, as PEFT's does, and a budget on the edge shows the difference.
        let budget = (self.initial - self.target) as f64 * left.powf(3.0) + self.target as f64;
        (budget as i64, step % self.delta_t == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_exact() {
        let s = Schedule { initial: 288, target: 96, tinit: 10, end: 90, delta_t: 7 };
        assert_eq!(s.at(i64::MIN), (288, false));
        assert_eq!(s.at(10), (288, false));
        assert_eq!(s.at(90), (96, false));
        assert_eq!(s.at(91), (96, true));
        assert_eq!(s.at(i64::MAX), (96, true));
    }

    #[test]
    fn never_rises() {
        let s = Schedule { initial: 288, target: 96, tinit: 10, end: 90, delta_t: 7 };
        let budgets: Vec<i64> = (0..100).map(|t| s.at(t).0).collect();
        assert!(budgets.windows(2).all(|w| w[0] >= w[1]));
    }
}
