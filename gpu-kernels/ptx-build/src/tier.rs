//! The GPU generations that get code of their own.

/// One PTX module: the oldest GPU it runs on and the PTX version its instructions need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Name as rustc, PTX and ptxas spell it.
    pub name: &'static str,
    /// Compute capability times ten.
    pub sm: u32,
    /// PTX version: as low as the instructions allow, since an old driver refuses a newer one.
    pub ptx: &'static str,
    /// Runs on this architecture only, not on later ones (the `a` targets).
    pub exact: bool,
}

/// All tiers, oldest first. What each adds for kernels: 61 dp4a; 70 independent lanes; 75 int8 and f16 mma, ldmatrix;
/// 80 cp.async, bf16 and larger mma shapes; 89 fp8; 90a wgmma and TMA.
///
/// `shfl.sync`, `barrier` and `activemask` need PTX 6.2, so 6.3 is the floor everywhere.
pub const TIERS: &[Tier] = &[
    Tier { name: "sm_50", sm: 50, ptx: "ptx63", exact: false },
    Tier { name: "sm_61", sm: 61, ptx: "ptx63", exact: false },
    Tier { name: "sm_70", sm: 70, ptx: "ptx63", exact: false },
    Tier { name: "sm_75", sm: 75, ptx: "ptx65", exact: false },
    Tier { name: "sm_80", sm: 80, ptx: "ptx74", exact: false },
    Tier { name: "sm_89", sm: 89, ptx: "ptx84", exact: false },
    Tier { name: "sm_90a", sm: 90, ptx: "ptx84", exact: true },
];

impl Tier {
    /// The tier with this name.
    pub fn named(name: &str) -> Option<&'static Tier> {
        TIERS.iter().find(|tier| tier.name == name)
    }

    /// Names of the `cfg`s that gate code by architecture: `sm_ge_80` holds from sm_80 on. rustc's own
    /// `target_feature` would do, but is empty for processors that it does not list.
    pub fn all_cfgs() -> impl Iterator<Item = String> {
        TIERS.iter().map(|tier| format!("sm_ge_{}", tier.sm)).chain(["sm_90a".into()])
    }

    /// The `cfg`s that hold for this tier.
    pub(crate) fn cfgs(&self) -> impl Iterator<Item = String> {
        let older = TIERS.iter().filter(|tier| tier.sm <= self.sm);
        older.map(|tier| format!("sm_ge_{}", tier.sm)).chain(self.exact.then(|| self.name.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cfgs_are_cumulative() {
        let cfgs = |name| Tier::named(name).unwrap().cfgs().collect::<Vec<_>>();
        assert_eq!(cfgs("sm_61"), ["sm_ge_50", "sm_ge_61"]);
        assert!(
            cfgs("sm_90a").contains(&"sm_ge_75".to_string())
                && cfgs("sm_90a").contains(&"sm_90a".to_string())
        );
        for tier in TIERS {
            assert!(tier.cfgs().all(|cfg| Tier::all_cfgs().any(|known| known == cfg)));
        }
    }
}
