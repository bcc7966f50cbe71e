//! Costs from timings: what [`Cut::choose`] must believe to choose what was fastest.

use gpu_kernels::driver::DeviceInfo;
use gpu_kernels::kernels::mmq::costs::Costs;
use gpu_kernels::kernels::mmq::tuning::Shape;
use gpu_kernels::kernels::mmq::{Candidate, Cut};
use gpu_kernels::tile::SPAN;
use quant::FormatId;

/// A loss that justifies a row of a format's own.
pub const MOST_LOSS: f64 = 0.05;
/// What choosing an untimed cut counts as losing: it was left out because it should take far longer.
const UNTIMED_LOSS: f64 = 1.0;
/// What a cost is moved by at a time.
const STEPS: [f64; 8] = [0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.25];
/// Numbers of columns from which cuts by warpgroups may be considered.
pub const HOPPER_FROM: [usize; 2] = [17, 33];
/// What a move must gain, of all problems together: a third of the noise of one.
const LEAST_GAIN: f64 = 0.003;
const MAX_PASSES: usize = 30;

/// A problem's cuts and what each took.
#[derive(Clone, Debug)]
pub struct Timed {
    /// The product.
    pub shape: Shape,
    /// Its columns.
    pub n_cols: usize,
    /// Nanoseconds of each cut that was timed: at least of one.
    pub cuts: Vec<(Cut, f64)>,
}

impl Timed {
    /// What a cut took.
    pub fn ns(&self, cut: Cut) -> Option<f64> {
        self.cuts.iter().find(|(timed, _)| *timed == cut).map(|&(_, ns)| ns)
    }

    /// The fastest.
    pub fn best(&self) -> (Cut, f64) {
        *self.cuts.iter().min_by(|a, b| a.1.total_cmp(&b.1)).expect("a cut was timed")
    }

    /// What more than the fastest a cut took, as a fraction.
    pub fn loss_of(&self, cut: Cut) -> f64 {
        self.ns(cut).map_or(UNTIMED_LOSS, |ns| ns / self.best().1 - 1.0)
    }
}

/// The problems of a format on a device.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    /// Format of the weights.
    pub format: FormatId,
    /// The device.
    pub device: &'a DeviceInfo,
    /// All that were timed.
    pub problems: &'a [Timed],
}

/// How much a choice of cuts loses.
#[derive(Clone, Copy, Debug)]
pub struct Losses {
    /// Problems that lose more than [`MOST_LOSS`].
    pub n_over: usize,
    /// The largest loss, and which problem's.
    pub worst: (f64, usize),
    /// All losses together.
    pub total: f64,
}

impl Measured<'_> {
    fn candidates(&self, timed: &Timed, costs: Costs) -> impl Iterator<Item = Candidate> {
        let Timed { shape, n_cols, .. } = timed;
        Cut::candidates(self.format, shape.all_rows(), *n_cols, shape.gated, self.device, costs)
    }

    /// What is lost by these costs.
    pub fn losses(&self, costs: Costs) -> Losses {
        let losses = self.problems.iter().map(|timed| {
            // As `Cut::choose` does.
            let chosen = self.candidates(timed, costs).min_by_key(|one| one.cycles);
            chosen.map_or(UNTIMED_LOSS, |one| timed.loss_of(one.cut))
        });
        let mut sum = Losses { n_over: 0, worst: (0.0, 0), total: 0.0 };
        for (i, loss) in losses.enumerate() {
            sum.n_over += usize::from(loss > MOST_LOSS);
            sum.total += loss;
            sum.worst = if loss > sum.worst.0 { (loss, i) } else { sum.worst };
        }
        sum
    }

    /// The costs by which these problems lose least, as far as moves from [`Measured::medians`] find them.
    pub fn fit(&self, before: Costs) -> Costs {
        let mut best = self.medians(before);
        let mut least = self.losses(best).total;
        let mut better = |costs: Costs| {
            let total = self.losses(costs).total;
            let moves = total < least - LEAST_GAIN;
            least = if moves { total } else { least };
            moves
        };
        for _ in 0..MAX_PASSES {
            let before = best;
            for hopper_from in HOPPER_FROM {
                let moved = Costs { hopper_from, ..best };
                best = if better(moved) { moved } else { best };
            }
            for number in 0..NUMBERS {
                for step in STEPS {
                    let mut moved = best;
                    scale(numbers(&mut moved)[number], step);
                    best = if better(moved) { moved } else { best };
                }
            }
            if best == before {
                break;
            }
        }
        best
    }

    /// Costs as measured, in cycles of the highest clock; those of no timed cut stay as they were.
    pub fn medians(&self, before: Costs) -> Costs {
        let mut costs = before;
        // How many times as large as the estimate, by cost.
        let mut ratios = vec![Vec::new(); NUMBERS];
        let mut of_halves = Vec::new();
        for (timed, one, cycles) in self.timings(before).filter(|(_, one, _)| !one.halved) {
            ratios[PLACES.of(one.cut, timed.shape.gated)].push(cycles / one.cycles as f64);
        }
        for (number, ratios) in numbers(&mut costs).into_iter().zip(ratios) {
            scale(number, median(ratios));
        }
        for (_, one, cycles) in self.timings(costs).filter(|(_, one, _)| one.halved) {
            of_halves.push(cycles / one.cycles as f64);
        }
        scale(&mut costs.halved_percent, median(of_halves));
        costs
    }

    /// What was timed: the problem, the candidate, its cycles for each span.
    fn timings(&self, costs: Costs) -> impl Iterator<Item = (&Timed, Candidate, f64)> {
        let ghz = f64::from(self.device.clock_khz) / 1e6;
        // All of them, whether or not they are considered now.
        let costs = Costs { hopper_from: HOPPER_FROM[0], ..costs };
        self.problems.iter().flat_map(move |timed| {
            let n_spans = timed.shape.k.div_ceil(SPAN) as f64;
            let all = self.candidates(timed, costs);
            all.filter_map(move |one| Some((timed, one, timed.ns(one.cut)? * ghz / n_spans)))
        })
    }
}

/// How many numbers a row has besides `hopper_from`.
const NUMBERS: usize = 10;
/// The place of each cut's cost among [`numbers`].
const PLACES: Costs =
    Costs { alone: [0, 1, 2], paired: [3, 4, 5], hopper: [6, 7], wide: 8, halved_percent: 9, hopper_from: 0 };

/// The numbers that the fit moves.
fn numbers(costs: &mut Costs) -> [&mut usize; NUMBERS] {
    let Costs { alone: [a, b, c], paired: [d, e, f], hopper: [g, h], wide, halved_percent, .. } = costs;
    [a, b, c, d, e, f, g, h, wide, halved_percent]
}

/// Multiplies, if there is anything to multiply with; costs stay above 0.
fn scale(number: &mut usize, by: impl Into<Option<f64>>) {
    if let Some(by) = by.into() {
        *number = ((*number as f64 * by).round() as usize).max(1);
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use gpu_kernels::kernels::mmq::tuning::{COLUMNS, SHAPES};

    use super::*;

    fn h100() -> DeviceInfo {
        DeviceInfo {
            sm: 90,
            n_sm: 132,
            smem_per_cta_bytes: 227 << 10,
            smem_per_sm_bytes: 228 << 10,
            clock_khz: 1_980_000,
            driver_version: 12_040,
            ..DeviceInfo::default()
        }
    }

    /// Timings as they would be if these costs were true.
    fn timed_by(costs: Costs, format: FormatId, device: &DeviceInfo) -> Vec<Timed> {
        let of_shape = |shape: &Shape| {
            let shape = *shape;
            let timed = move |&n_cols: &usize| {
                let costs = Costs { hopper_from: 17, ..costs };
                let all = Cut::candidates(format, shape.all_rows(), n_cols, shape.gated, device, costs);
                let ns = |cycles: usize| (cycles * shape.k.div_ceil(SPAN)) as f64 / 1.98;
                Timed { shape, n_cols, cuts: all.map(|one| (one.cut, ns(one.cycles))).collect() }
            };
            COLUMNS.iter().map(timed).collect::<Vec<_>>()
        };
        SHAPES.iter().flat_map(of_shape).collect()
    }

    #[test]
    fn known_costs_are_found_again() {
        let known = Costs {
            alone: [700, 1500, 2600],
            paired: [1200, 2900, 4500],
            halved_percent: 93,
            hopper: [1400, 2200],
            hopper_from: 17,
            wide: 7000,
        };
        let device = h100();
        for format in [FormatId::Q4_0, FormatId::Q6_K] {
            let problems = timed_by(known, format, &device);
            let measured = Measured { format, device: &device, problems: &problems };
            let before = Costs::find(format, &device);
            assert!(measured.losses(before).n_over > 0);
            let mut found = measured.fit(before);
            assert_eq!((found.hopper_from, measured.losses(found).n_over), (17, 0));
            assert!(measured.losses(found).total < 0.01, "{:?}", measured.losses(found));
            let mut known = known;
            for (found, known) in numbers(&mut found).into_iter().zip(numbers(&mut known)) {
                assert!(found.abs_diff(*known) * 100 <= *known, "{found} for {known}");
            }
        }
    }

    #[test]
    fn costs_move_where_medians_lose() {
        let (device, format) = (h100(), FormatId::Q4_0);
        let before = Costs::find(format, &device);
        let mut problems = timed_by(before, format, &device);
        // Something that no cost says: with few columns wider cuts take half as long again.
        for timed in problems.iter_mut().filter(|timed| timed.n_cols <= 32) {
            for (cut, ns) in &mut timed.cuts {
                *ns *= if cut.cols() > 16 { 1.5 } else { 1.0 };
            }
        }
        let measured = Measured { format, device: &device, problems: &problems };
        let (medians, fitted) = (measured.medians(before), measured.fit(before));
        let [medians, fitted] = [medians, fitted].map(|costs| measured.losses(costs).total);
        assert!(fitted < 0.5 * medians, "{fitted} of {medians}");
    }

    #[test]
    fn losses_are_told_from_the_fastest() {
        let timed = Timed {
            shape: SHAPES[0],
            n_cols: 16,
            cuts: vec![(Cut::NARROW_16, 12.0), (Cut::NARROW_32, 10.0)],
        };
        assert_eq!(timed.best(), (Cut::NARROW_32, 10.0));
        assert!((timed.loss_of(Cut::NARROW_16) - 0.2).abs() < 1e-9);
        assert_eq!(timed.loss_of(Cut::Wide), UNTIMED_LOSS);
        let (device, format) = (h100(), FormatId::Q4_0);
        let problems = [timed];
        let measured = Measured { format, device: &device, problems: &problems };
        let Losses { n_over, worst, total } = measured.losses(Costs::find(format, &device));
        assert_eq!((n_over, worst.1, total), (1, 0, worst.0));
    }
}
