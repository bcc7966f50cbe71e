//! Cases and benchmarks of `mmq_hopper`, which `mmq` launches.

use quant::FormatId;

use crate::case::{Kernel, Problem, Random, Tiers};
use crate::kernels::mmq::{Case, Cut, Mmq, gated, plain};
use crate::kernels::product::Glu;

/// The row in the registry.
#[derive(Debug)]
pub struct MmqHopper;

/// Few CTAs, so that one has several tiles.
const FEW: Cut = Cut::HOPPER_32.of_ctas(2);
const MANY: Cut = Cut::HOPPER_64.of_ctas(2);

/// Every kind of format (with halves, with an offset, with both), the edges of tiles, spans and rounds, and each extra.
const CASES: &[Case] = &[
    plain(FormatId::Q4_0, MANY, &[63], 32, 1),
    plain(FormatId::Q4_0, FEW, &[300], 1184, 33),
    plain(FormatId::Q4_0, MANY, &[200], 4640, 65),
    plain(FormatId::Q8_0, FEW, &[65], 288, 31),
    plain(FormatId::Q8_0, MANY, &[129], 2336, 64),
    plain(FormatId::Q4_1, MANY, &[64], 800, 50),
    plain(FormatId::Q5_1, FEW, &[65], 416, 32),
    plain(FormatId::Q4_K, MANY, &[1], 1280, 70),
    plain(FormatId::Q4_K, FEW, &[70], 768, 20),
    plain(FormatId::Q2_K, MANY, &[70], 768, 40),
    plain(FormatId::Q6_K, MANY, &[20, 140, 1], 768, 20),
    plain(FormatId::Q6_K, FEW, &[70], 1024, 9),
    plain(FormatId::NVFP4, MANY, &[33], 320, 17),
    plain(FormatId::IQ3_XXS, MANY, &[97], 512, 66),
    Case { added: true, ..plain(FormatId::Q4_0, MANY, &[37, 130], 288, 12) },
    Case { added: true, ..plain(FormatId::Q4_K, FEW, &[40, 3, 64], 256, 40) },
    Case { added: true, glu: Some(Glu::Silu), ..plain(FormatId::Q4_0, MANY, &[70; 2], 1312, 50) },
    Case { added: true, glu: Some(Glu::Gelu), ..plain(FormatId::Q8_0, FEW, &[70; 2], 544, 20) },
    Case { added: true, mixture: Some((3, 2, true)), ..plain(FormatId::Q5_0, MANY, &[50], 64, 90) },
    Case {
        added: true,
        glu: Some(Glu::Silu),
        mixture: Some((5, 2, false)),
        ..plain(FormatId::Q4_0, FEW, &[33; 2], 512, 25)
    },
];

/// The shapes of batches of an 8B model.
const BENCH: &[Case] = &[
    plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 14336, 64),
    plain(FormatId::Q4_0, Cut::HOPPER_64, &[4096], 14336, 64),
    plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 4096, 64),
    plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 14336, 32),
    plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096], 14336, 16),
    plain(FormatId::Q4_0, Cut::HOPPER_64, &[4096], 14336, 128),
    plain(FormatId::Q4_0, Cut::HOPPER_64, &[4096, 1024, 1024], 4096, 64),
    plain(FormatId::Q4_0, Cut::HOPPER_32, &[4096, 1024, 1024], 4096, 64),
    gated(FormatId::Q4_0, Cut::HOPPER_64, &[14336; 2], 4096, 64),
    gated(FormatId::Q4_0, Cut::HOPPER_32, &[14336; 2], 4096, 64),
    gated(FormatId::Q4_0, Cut::HOPPER_32, &[14336; 2], 4096, 32),
    gated(FormatId::Q4_0, Cut::HOPPER_32, &[14336; 2], 4096, 16),
    plain(FormatId::Q8_0, Cut::HOPPER_32, &[4096], 14336, 64),
    plain(FormatId::Q8_0, Cut::HOPPER_32, &[4096], 14336, 32),
    gated(FormatId::Q8_0, Cut::HOPPER_64, &[14336; 2], 4096, 64),
    plain(FormatId::Q4_K, Cut::HOPPER_32, &[4096], 14336, 64),
    plain(FormatId::Q4_K, Cut::HOPPER_32, &[4096], 14336, 32),
    gated(FormatId::Q4_K, Cut::HOPPER_64, &[14336; 2], 4096, 64),
    plain(FormatId::Q6_K, Cut::HOPPER_32, &[4096], 14336, 64),
    plain(FormatId::Q6_K, Cut::HOPPER_32, &[4096], 14336, 32),
    plain(FormatId::Q6_K, Cut::HOPPER_64, &[128_256], 4096, 64),
    plain(FormatId::IQ3_XXS, Cut::HOPPER_64, &[4096], 14336, 64),
];

impl Kernel for MmqHopper {
    const NAME: &'static str = "mmq_hopper";
    type Case = Case;
    const CASES: &'static [Case] = CASES;
    const BENCH: &'static [Case] = BENCH;
    const NMSE_MAX: f64 = Mmq::NMSE_MAX;
    const TIERS: Tiers = Tiers::Only("sm_90a");
    #[cfg(feature = "emu")]
    const ENTRIES: &'static [&'static [crate::emu::Entry]] = &[super::ENTRIES];

    fn problem(case: &Case, random: &mut Random) -> Problem {
        Mmq::problem(case, random)
    }

    fn peer(case: &Case) -> Option<alloc::string::String> {
        Mmq::peer(case)
    }

    fn bytes(case: &Case) -> u64 {
        Mmq::bytes(case)
    }

    fn flops(case: &Case) -> u64 {
        Mmq::flops(case)
    }
}
