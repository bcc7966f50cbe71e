//! Modules loaded when their first kernel is asked for.
//!
//! A plan asks once for each of its launches and keeps the answer; so nothing is loaded while tokens are generated, and
//! what a model does not use is never compiled.

use alloc::collections::BTreeMap;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::driver::{Driver, DriverError, ModuleId, StreamId};
use crate::launch::Launch;
use crate::ptx::{self, PtxModule};

/// No module's number: drivers count from 0.
const NOT_LOADED: u32 = u32::MAX;

/// Who knows which loaded module has a kernel.
pub trait FindModule {
    /// The module, loaded if it was not.
    fn find_module(&mut self, driver: &dyn Driver, entry: &str) -> Result<ModuleId, DriverError>;
}

/// A module that has every kernel asked for.
impl FindModule for ModuleId {
    fn find_module(&mut self, _driver: &dyn Driver, _entry: &str) -> Result<ModuleId, DriverError> {
        Ok(*self)
    }
}

/// The embedded modules as one driver has loaded them.
#[derive(Debug, Default)]
pub struct Modules {
    /// The one tier to take; else the best that the driver compiles.
    tier: Option<&'static str>,
    /// By name and tier.
    loaded: BTreeMap<(&'static str, &'static str), ModuleId>,
    by_entry: BTreeMap<&'static str, ModuleId>,
}

impl Modules {
    /// Nothing loaded. For each kernel the best tier is taken that the device runs and the driver compiles.
    pub fn new() -> Modules {
        Modules::default()
    }

    /// Nothing loaded; only modules of this tier are taken.
    pub fn of_tier(tier: &'static str) -> Modules {
        Modules { tier: Some(tier), ..Modules::default() }
    }

    /// Launches a kernel, of a module loaded before or now.
    pub fn launch(
        &mut self,
        driver: &dyn Driver,
        launch: &Launch,
        stream: StreamId,
    ) -> Result<(), DriverError> {
        let module = self.find_module(driver, launch.entry)?;
        driver.launch(module, launch, stream)
    }

    /// Loads side by side the modules that these kernels need and that are not there: a driver compiles each on one
    /// core, for a second or more the first time. `run` runs that many tasks. What does not load is left to
    /// [`FindModule::find_module`], which says why or takes another tier.
    pub fn load_ahead<'a>(
        &mut self,
        driver: &(dyn Driver + Send + Sync),
        entries: impl Iterator<Item = &'a str>,
        run: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
    ) {
        // Known to the compiler: a program without modules has nothing of this.
        if ptx::MODULES.is_empty() || driver.builtin().is_some() {
            return;
        }
        let sm = driver.info().sm;
        let mut missing: BTreeMap<_, (&'static PtxModule, AtomicU32)> = BTreeMap::new();
        for entry in entries.filter(|entry| !self.by_entry.contains_key(entry)) {
            if let Some(module) = self.candidates(sm, entry).next() {
                missing.insert((module.name, module.tier), (module, AtomicU32::new(NOT_LOADED)));
            }
        }
        let missing: Vec<_> = missing.into_values().collect();
        run(missing.len(), &|i| {
            let (module, id) = &missing[i];
            if let Ok(loaded) = driver.load(module) {
                id.store(loaded.0, Ordering::Release);
            }
        });
        for (module, id) in missing {
            match id.into_inner() {
                NOT_LOADED => {}
                id => self.insert(module, ModuleId(id)),
            }
        }
    }

    /// The modules with an entry that may serve, best first.
    fn candidates(&self, sm: u32, entry: &str) -> impl Iterator<Item = &'static PtxModule> + use<> {
        let only = self.tier;
        ptx::modules_for(sm, entry)
            .into_iter()
            .filter(move |module| only.is_none_or(|tier| tier == module.tier))
    }

    /// The whole module is loaded, so none of its entries needs another search.
    fn insert(&mut self, module: &'static PtxModule, id: ModuleId) {
        self.loaded.insert((module.name, module.tier), id);
        self.by_entry.extend(module.kernels.iter().map(|&name| (name, id)));
    }

    /// Name and tier of the modules loaded so far.
    pub fn loaded(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.loaded.keys().copied()
    }

    /// Unloads all modules; those of a driver that is gone may just be dropped.
    pub fn unload(self, driver: &dyn Driver) -> Result<(), DriverError> {
        self.loaded.into_values().map(|module| driver.unload(module)).fold(Ok(()), Result::and)
    }
}

impl FindModule for Modules {
    fn find_module(&mut self, driver: &dyn Driver, entry: &str) -> Result<ModuleId, DriverError> {
        if let Some(module) = driver.builtin() {
            return Ok(module);
        }
        if let Some(&module) = self.by_entry.get(entry) {
            return Ok(module);
        }
        let mut refused = None;
        for module in self.candidates(driver.info().sm, entry) {
            match driver.load(module) {
                Ok(id) => {
                    self.insert(module, id);
                    return Ok(id);
                }
                // An old driver: the tier below may do.
                Err(error @ DriverError::Module { too_new: true, .. }) => refused = refused.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        Err(refused.unwrap_or_else(|| DriverError::NoKernel { entry: entry.to_string() }))
    }
}

/// A driver's modules, lent.
impl FindModule for &mut Modules {
    fn find_module(&mut self, driver: &dyn Driver, entry: &str) -> Result<ModuleId, DriverError> {
        (**self).find_module(driver, entry)
    }
}

#[cfg(all(test, feature = "ptx"))]
mod tests {
    use alloc::string::String;

    use super::*;
    use crate::emu::{Emulator, Options};
    use crate::registry::KERNELS;

    #[test]
    fn every_entry_is_embedded_for_every_tier_and_its_module_is_whole() {
        let tiers: alloc::collections::BTreeSet<_> = ptx::MODULES.iter().map(|module| module.tier).collect();
        assert!(!tiers.is_empty());
        for kernel in KERNELS {
            let with: alloc::collections::BTreeSet<_> = ptx::MODULES
                .iter()
                .filter(|module| kernel.tiers().has(module.tier, module.sm))
                .map(|module| module.tier)
                .collect();
            for entry in kernel.entries().iter().flat_map(|table| table.iter()) {
                let modules = ptx::MODULES.iter().filter(|module| module.has(entry.name));
                assert!(modules.map(|module| module.tier).eq(with.iter().copied()), "{}", entry.name);
            }
        }
        for module in ptx::MODULES {
            let text: String = module.text();
            assert!(text.starts_with(".version ") && text.contains(module.tier), "{}", module.name);
            assert_eq!(text.matches(".visible .entry ").count(), module.kernels.len(), "{}", module.name);
        }
    }

    #[test]
    fn all_tiers_take_less_than_six_megabytes() {
        // Fewer tiers share less: of any of them the bound holds all the more.
        let bytes = ptx::embedded_bytes();
        assert!(bytes > 0 && bytes <= 6_000_000, "{bytes} bytes");
    }

    #[test]
    fn a_gpu_gets_the_best_tier_that_it_runs() {
        let tiers = |sm| {
            ptx::modules_for(sm, "rms_norm_f32")
                .iter()
                .map(|module| module.tier)
                .collect::<alloc::vec::Vec<_>>()
        };
        assert_eq!(tiers(90), ["sm_90a", "sm_89", "sm_80", "sm_75", "sm_70", "sm_61", "sm_50"]);
        assert_eq!(tiers(120).first(), Some(&"sm_89"));
        assert_eq!(tiers(60), ["sm_50"]);
    }

    #[test]
    fn the_emulator_needs_no_module() {
        let emulator = Emulator::new(Options::default());
        let mut modules = Modules::new();
        assert_eq!(modules.find_module(&emulator, "rms_norm_f32"), Ok(Emulator::MODULE));
        modules.load_ahead(&emulator, ["rms_norm_f32"].into_iter(), |_, _| panic!("nothing to load"));
        assert_eq!(modules.loaded().count(), 0);
    }
}
