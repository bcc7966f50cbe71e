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
    /// The tier whose code it has, under a header of its own: itself, or an older one where no kernel asks for more.
    pub code_of: &'static str,
}

/// All tiers, oldest first. What each adds for kernels: 61 dp4a; 75 int8 and f16 mma, ldmatrix; 80 cp.async, bf16 and
/// larger mma shapes; 90a wgmma and TMA. 70 (independent lanes) and 89 (fp8) add nothing that a kernel uses; LLVM gave both
/// the code of the tier before.
///
/// `shfl.sync`, `barrier` and `activemask` need PTX 6.2, so 6.3 is the floor everywhere.
pub const TIERS: &[Tier] = &[
    Tier { name: "sm_50", sm: 50, ptx: "ptx63", exact: false, code_of: "sm_50" },
    Tier { name: "sm_61", sm: 61, ptx: "ptx63", exact: false, code_of: "sm_61" },
    Tier { name: "sm_70", sm: 70, ptx: "ptx63", exact: false, code_of: "sm_61" },
    Tier { name: "sm_75", sm: 75, ptx: "ptx65", exact: false, code_of: "sm_75" },
    Tier { name: "sm_80", sm: 80, ptx: "ptx74", exact: false, code_of: "sm_80" },
    Tier { name: "sm_89", sm: 89, ptx: "ptx84", exact: false, code_of: "sm_80" },
    Tier { name: "sm_90a", sm: 90, ptx: "ptx84", exact: true, code_of: "sm_90a" },
];

impl Tier {
    /// The tier with this name.
    pub fn named(name: &str) -> Option<&'static Tier> {
        TIERS.iter().find(|tier| tier.name == name)
    }

    /// The tier whose code this one has.
    pub(crate) fn compiled(&self) -> &'static Tier {
        Tier::named(self.code_of).expect("a tier of the table")
    }

    /// The tiers that are compiled: only those can be told apart in the source.
    fn all_compiled() -> impl Iterator<Item = &'static Tier> {
        TIERS.iter().filter(|tier| tier.code_of == tier.name)
    }

    /// Names of the `cfg`s that gate code by architecture: `sm_ge_80` holds from sm_80 on. rustc's own
    /// `target_feature` would do, but is empty for processors that it does not list.
    pub fn all_cfgs() -> impl Iterator<Item = String> {
        Tier::all_compiled().map(|tier| format!("sm_ge_{}", tier.sm)).chain(["sm_90a".into()])
    }

    /// The `cfg`s that hold for this tier, which is compiled.
    pub(crate) fn cfgs(&self) -> impl Iterator<Item = String> {
        let older = Tier::all_compiled().filter(|tier| tier.sm <= self.sm);
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
            // What a tier is given runs on it.
            let compiled = tier.compiled();
            assert!(
                compiled.code_of == compiled.name && compiled.sm <= tier.sm && compiled.exact == tier.exact
            );
        }
    }
}
