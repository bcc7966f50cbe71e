//! Modules loaded when their first kernel is asked for.
//!
//! A plan asks once for each of its launches and keeps the answer; so nothing is loaded while tokens are generated, and
//! what a model does not use is never compiled.

use alloc::collections::BTreeMap;
use alloc::string::ToString;

use crate::driver::{Driver, DriverError, ModuleId, StreamId};
use crate::launch::Launch;
use crate::ptx::{self, PtxModule};

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

    /// Name and tier of the modules loaded so far.
    pub fn loaded(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.loaded.keys().copied()
    }

    /// Unloads all modules; those of a driver that is gone may just be dropped.
    pub fn unload(self, driver: &dyn Driver) -> Result<(), DriverError> {
        self.loaded.into_values().map(|module| driver.unload(module)).fold(Ok(()), Result::and)
    }

    fn load(&mut self, driver: &dyn Driver, module: &'static PtxModule) -> Result<ModuleId, DriverError> {
        let key = (module.name, module.tier);
        if let Some(&id) = self.loaded.get(&key) {
            return Ok(id);
        }
        let id = driver.load(module)?;
        self.loaded.insert(key, id);
        Ok(id)
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
        for module in ptx::modules_for(driver.info().sm, entry) {
            if self.tier.is_some_and(|tier| tier != module.tier) {
                continue;
            }
            match self.load(driver, module) {
                Ok(id) => {
                    // The whole module is loaded, so none of its entries needs another search.
                    self.by_entry.extend(module.kernels.iter().map(|&name| (name, id)));
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
        assert_eq!(modules.loaded().count(), 0);
    }
}
