//! What the cuts of `mmq` cost, by device family and format: the numbers that [`Cut::choose`] compares.
//!
//! The rule is fixed: a problem's CTAs, divided among the multiprocessors and rounded up, times what a CTA costs. Only the
//! costs differ. A family has one row for all formats, and rows of their own for those formats alone with which that
//! one loses over 5 % of the time to the fastest cut, at any shape or number of columns that
//! [`tuning`](super::tuning) lists.
//!
//! `gpu-test --tune` makes the rows, on a device of the family: it times every cut that might win, fits the costs and prints
//! what the rule loses with the present costs and with the fitted ones, then the rows as they stand here, as comments those
//! of formats with which the family's row does not lose so much. A cost is the median, over all problems, of what was
//! measured for each span and round of CTAs; then costs are moved, one at a time, while the choices lose less. So costs are
//! compared within their row only, and a row is replaced as a whole. A family's row for all formats is that of Q4_0.

use quant::FormatId;

use super::{Cut, Narrow};
use crate::driver::DeviceInfo;

/// Cycles that a CTA takes for each span of k (256 weights of a row) while every multiprocessor has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Narrow cuts of 16, 32 and 64 columns, with one row tile and 16 warps. With fewer warps it is more in proportion.
    pub alone: [usize; 3],
    /// The same with two row tiles: neighbours, or gate and up.
    pub paired: [usize; 3],
    /// What two CTAs of 8 warps on one multiprocessor take of what one of 16 takes twice, in percent.
    pub halved_percent: usize,
    /// Cuts by warpgroups of 32 and 64 columns: a tile.
    pub hopper: [usize; 2],
    /// Columns from which these are considered: more than a narrow cut's 16.
    pub hopper_from: usize,
    /// The wide cut.
    pub wide: usize,
}

/// The rows of a device family.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// What its maker calls it.
    pub name: &'static str,
    /// Its compute capabilities, times ten.
    pub sms: &'static [u32],
    /// The row for every format without one of its own.
    pub default: Costs,
    /// The others.
    pub formats: &'static [(FormatId, Costs)],
}

/// Of families that were not measured: as measured on an H100 with Q4_0. Narrow cuts and those by warpgroups at m = 4096,
/// k = 14336, two row tiles taking 95 % of twice the time of one; the wide cut at n = 512. With 32 columns and fewer narrow
/// cuts were faster than those by warpgroups.
const DEFAULT: Costs = Costs {
    alone: [830, 1230, 1930],
    paired: [1577, 2337, 3667],
    halved_percent: 100,
    hopper: [1670, 2790],
    hopper_from: 33,
    wide: 9000,
};

/// GPUs with `wgmma`, as measured on an H200, whose memory is faster than an H100's: few of these cuts wait for it. Rows as the
/// command prints them.
#[rustfmt::skip]
const HOPPER: Family = Family {
    name: "Hopper",
    sms: &[90],
    default: Costs { alone: [890, 1409, 2357], paired: [1617, 2563, 4013], halved_percent: 90, hopper: [1919, 3296], hopper_from: 17, wide: 10738 },
    formats: &[
        (FormatId::Q4_1, Costs { alone: [824, 1540, 2100], paired: [1499, 2823, 4385], halved_percent: 90, hopper: [1927, 3358], hopper_from: 17, wide: 12367 }),
        (FormatId::Q5_1, Costs { alone: [1024, 1617, 2160], paired: [1876, 2960, 4485], halved_percent: 89, hopper: [2207, 3473], hopper_from: 17, wide: 12511 }),
        (FormatId::Q2_K, Costs { alone: [969, 1937, 2832], paired: [2129, 3697, 6142], halved_percent: 93, hopper: [3245, 5125], hopper_from: 17, wide: 18675 }),
        (FormatId::Q4_K, Costs { alone: [860, 1531, 2115], paired: [1549, 2831, 4442], halved_percent: 89, hopper: [2029, 3404], hopper_from: 17, wide: 12453 }),
        (FormatId::Q5_K, Costs { alone: [1016, 1655, 2192], paired: [2069, 3056, 4665], halved_percent: 90, hopper: [2271, 3498], hopper_from: 17, wide: 12936 }),
        (FormatId::Q6_K, Costs { alone: [1069, 1972, 2565], paired: [2583, 3770, 5553], halved_percent: 93, hopper: [2797, 4775], hopper_from: 17, wide: 17062 }),
        (FormatId::IQ4_NL, Costs { alone: [932, 1558, 2507], paired: [1900, 2918, 4318], halved_percent: 91, hopper: [2260, 3595], hopper_from: 17, wide: 11023 }),
        (FormatId::IQ3_XXS, Costs { alone: [1056, 1952, 2891], paired: [2175, 3743, 5072], halved_percent: 93, hopper: [2685, 3764], hopper_from: 17, wide: 12041 }),
        (FormatId::IQ2_XXS, Costs { alone: [988, 1696, 2633], paired: [1904, 3218, 4543], halved_percent: 93, hopper: [2372, 3438], hopper_from: 17, wide: 11233 }),
        (FormatId::MXFP4, Costs { alone: [972, 1781, 2883], paired: [2010, 3352, 4766], halved_percent: 92, hopper: [2389, 3463], hopper_from: 17, wide: 11088 }),
    ],
};

/// Every family that was measured.
pub const FAMILIES: &[Family] = &[HOPPER];

impl Costs {
    /// The row of a format on a device.
    pub fn find(format: FormatId, device: &DeviceInfo) -> Costs {
        let formats = Costs::family(device).map_or(&[][..], |family| family.formats);
        let row = formats.iter().find(|(of, _)| *of == format);
        row.map_or(Costs::find_family(device), |&(_, costs)| costs)
    }

    /// The row of all formats on a device that have none of their own.
    pub fn find_family(device: &DeviceInfo) -> Costs {
        Costs::family(device).map_or(DEFAULT, |family| family.default)
    }

    fn family(device: &DeviceInfo) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.sms.contains(&device.sm))
    }

    /// What a cut costs, a narrow one with all warps.
    pub fn of(mut self, cut: Cut, gated: bool) -> usize {
        *self.of_mut(cut, gated)
    }

    /// The number that says so.
    pub fn of_mut(&mut self, cut: Cut, gated: bool) -> &mut usize {
        match cut {
            Cut::Narrow(Narrow { cols, row_tiles, .. }) => {
                let costs = if gated || row_tiles == 2 { &mut self.paired } else { &mut self.alone };
                &mut costs[if cols <= 16 { 0 } else { usize::from(cols > 32) + 1 }]
            }
            Cut::Hopper(hopper) => &mut self.hopper[usize::from(hopper.cols > 32)],
            Cut::Wide => &mut self.wide,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::mmq::tuning::{COLUMNS, H100, SHAPES};
    use crate::kernels::mmq::{Candidate, Hopper};

    #[test]
    fn a_table_names_families_and_formats_once() {
        let mut sms: alloc::vec::Vec<u32> = FAMILIES.iter().flat_map(|family| family.sms).copied().collect();
        sms.sort_unstable();
        assert!(sms.windows(2).all(|pair| pair[0] != pair[1]), "{sms:?}");
        for family in FAMILIES {
            for (i, (format, costs)) in family.formats.iter().enumerate() {
                let name = family.name;
                assert!(super::super::FORMATS.contains(format), "{name}: {format} is no format of weights");
                assert!(
                    family.formats[..i].iter().all(|(other, _)| other != format),
                    "{name}: {format} twice"
                );
                assert_ne!(*costs, family.default, "{name}: {format} needs no row");
            }
        }
    }

    #[test]
    fn every_cost_has_its_cuts() {
        let mut costs = DEFAULT;
        let cuts =
            [Cut::NARROW_16, Cut::NARROW_32, Cut::NARROW_64, Cut::HOPPER_32, Cut::HOPPER_64, Cut::Wide];
        for (i, cut) in cuts.into_iter().enumerate() {
            *costs.of_mut(cut, false) = i;
            *costs.of_mut(cut.paired().of_warps(8), false) += 10;
        }
        let other = Hopper { cols: 64, ctas: 7 };
        assert_eq!((costs.alone, costs.paired), ([0, 1, 2], [1587, 2347, 3677]));
        assert_eq!((costs.hopper, costs.wide), ([13, 14], 15));
        assert_eq!((costs.of(Cut::Hopper(other), true), costs.of(Cut::NARROW_64, true)), (14, 3677));
    }

    #[test]
    fn the_choice_is_the_cheapest_candidate() {
        for format in super::super::FORMATS {
            let costs = Costs::find(*format, &H100);
            for shape in SHAPES {
                for &n_cols in COLUMNS {
                    let (rows, gated) = (shape.all_rows(), shape.gated);
                    let all = || Cut::candidates(*format, rows, n_cols, gated, &H100, costs);
                    let chosen = Cut::choose(*format, rows, n_cols, gated, &H100);
                    let Candidate { cycles, .. } = all().find(|one| one.cut == chosen).expect("a candidate");
                    assert!(all().all(|one| one.cycles >= cycles), "{format} {shape} {n_cols}");
                    // No cut twice, and of two halves one whole.
                    for one in all() {
                        assert_eq!(all().filter(|other| other.cut == one.cut).count(), 1);
                        let whole = one.cut.of_warps(16);
                        assert!(!one.halved || all().any(|other| other.cut == whole && !other.halved));
                    }
                }
            }
        }
    }
}
