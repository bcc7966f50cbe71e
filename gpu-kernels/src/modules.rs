//! Modules, one for each kernel entry, loaded when their kernel is asked for.
//!
//! A plan asks once for each of its launches and keeps the answer; so nothing is loaded while tokens are generated, and
//! what a plan does not launch is never compiled.

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
    /// By entry.
    loaded: BTreeMap<&'static str, (&'static PtxModule, ModuleId)>,
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

    /// The modules of these kernels that are not there, in this order, to be loaded by whoever has the time.
    pub fn missing<'a>(&self, driver: &dyn Driver, entries: impl Iterator<Item = &'a str>) -> Missing {
        let mut missing = Missing(Vec::new());
        // Known to the compiler: a program without modules has nothing of this.
        if ptx::MODULES.is_empty() || driver.builtin().is_some() {
            return missing;
        }
        let sm = driver.info().sm;
        for entry in entries {
            let known = missing.0.iter().any(|(module, _)| module.entry == entry);
            if known || self.loaded.contains_key(entry) {
                continue;
            }
            if let Some(module) = self.candidates(sm, entry).next() {
                missing.0.push((module, AtomicU32::new(NOT_LOADED)));
            }
        }
        missing
    }

    /// Takes over what was loaded of them; a module that is there by now stays, and the other is unloaded.
    pub fn keep(&mut self, missing: Missing, driver: &dyn Driver) -> Result<(), DriverError> {
        let mut result = Ok(());
        // As in `missing`.
        if ptx::MODULES.is_empty() {
            return result;
        }
        for (module, id) in missing.0 {
            match (id.into_inner(), self.loaded.contains_key(module.entry)) {
                (NOT_LOADED, _) => {}
                (id, true) => result = result.and(driver.unload(ModuleId(id))),
                (id, false) => self.insert(module, ModuleId(id)),
            }
        }
        result
    }

    /// The modules of an entry that may serve, best first.
    fn candidates(&self, sm: u32, entry: &str) -> impl Iterator<Item = &'static PtxModule> + use<> {
        let only = self.tier;
        ptx::modules_for(sm, entry)
            .into_iter()
            .filter(move |module| only.is_none_or(|tier| tier == module.tier))
    }

    fn insert(&mut self, module: &'static PtxModule, id: ModuleId) {
        self.loaded.insert(module.entry, (module, id));
    }

    /// The modules loaded so far.
    pub fn loaded(&self) -> impl Iterator<Item = &'static PtxModule> {
        self.loaded.values().map(|&(module, _)| module)
    }

    /// Unloads all modules; those of a driver that is gone may just be dropped.
    pub fn unload(self, driver: &dyn Driver) -> Result<(), DriverError> {
        self.loaded.into_values().map(|(_, id)| driver.unload(id)).fold(Ok(()), Result::and)
    }
}

/// Modules that were not loaded when they were asked for. Unpacking them is work for many cores, and a driver takes up to
/// some 0.8 s to compile one the first time. What does not load is left to [`FindModule::find_module`], which says why or
/// takes another tier.
#[derive(Debug)]
pub struct Missing(Vec<(&'static PtxModule, AtomicU32)>);

impl Missing {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether all were there.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// They themselves.
    pub fn modules(&self) -> impl Iterator<Item = &'static PtxModule> {
        self.0.iter().map(|&(module, _)| module)
    }

    /// Loads one of them.
    pub fn load(&self, driver: &dyn Driver, i: usize) {
        let (module, id) = &self.0[i];
        if id.load(Ordering::Relaxed) == NOT_LOADED
            && let Ok(loaded) = driver.load(module)
        {
            id.store(loaded.0, Ordering::Release);
        }
    }
}

impl FindModule for Modules {
    fn find_module(&mut self, driver: &dyn Driver, entry: &str) -> Result<ModuleId, DriverError> {
        if let Some(module) = driver.builtin() {
            return Ok(module);
        }
        if let Some(&(_, id)) = self.loaded.get(entry) {
            return Ok(id);
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

#[cfg(all(test, ptx_embedded))]
mod tests {
    use alloc::collections::BTreeSet;
    use std::sync::Mutex;

    use super::*;
    use crate::driver::{DeviceInfo, EventId, MemKind};
    use crate::emu::{Emulator, Options};
    use crate::launch::DevicePtr;
    use crate::registry::{self, KERNELS};

    #[test]
    fn every_entry_is_embedded_for_every_tier() {
        let tiers: BTreeSet<_> = ptx::MODULES.iter().map(|module| module.tier).collect();
        assert!(!tiers.is_empty());
        for PtxModule { file, entry, .. } in ptx::MODULES {
            let kernel = registry::find(file).unwrap_or_else(|| panic!("registry.rs has no kernel {file}"));
            let mut named = kernel.entries().iter().flat_map(|table| table.iter());
            assert!(
                named.any(|named| named.name == *entry),
                "{entry} is in the PTX of {file}, not in its ENTRIES"
            );
        }
        for kernel in KERNELS {
            let with: BTreeSet<_> = ptx::MODULES
                .iter()
                .filter(|module| kernel.tiers().has(module.tier, module.sm))
                .map(|module| module.tier)
                .collect();
            for entry in kernel.entries().iter().flat_map(|table| table.iter()) {
                let modules = ptx::MODULES.iter().filter(|module| module.entry == entry.name);
                assert!(
                    modules.map(|module| module.tier).eq(with.iter().copied()),
                    "{} of {} is not in the PTX of each of its tiers: is `in \"{}\";` right?",
                    entry.name,
                    kernel.name(),
                    kernel.name()
                );
            }
        }
    }

    /// Names of the file's tables, functions and shared memory, as rustc writes them. (What else an entry may name it
    /// declares itself; ptxas tells, to which `cargo xtask ptx-check` gives every entry by itself.)
    fn symbols(text: &str) -> impl Iterator<Item = &str> {
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.');
        let words = text.split(move |c| !is_word(c));
        words.filter(|word| ["anon_", "_R", "dyn_smem"].iter().any(|start| word.starts_with(start)))
    }

    #[test]
    fn a_module_is_one_entry_and_all_that_it_names() {
        let mut n_tables = 0;
        for module in ptx::MODULES {
            let text = module.text();
            let name = module.entry;
            assert!(text.starts_with(".version ") && text.contains(module.tier), "{name}");
            let (before, entry) = text.split_once(".visible .entry ").expect(name);
            assert!(entry.starts_with(&alloc::format!("{name}(\n")) && !entry.contains(".visible"), "{name}");
            assert!(!text.contains(".func") && !text.contains("call."), "{name}");
            for used in symbols(entry) {
                let there = before.contains(&alloc::format!(" {used}["));
                assert!(there, "{name}, {}: {used} is missing", module.tier);
            }
            for table in before.lines().filter(|line| line.starts_with(".global")) {
                let table = table.split('[').next().and_then(|start| start.rsplit(' ').next()).expect(name);
                assert!(
                    symbols(entry).any(|used| used == table),
                    "{name}, {}: {table} is not used",
                    module.tier
                );
                n_tables += 1;
            }
        }
        // There are some to forget.
        assert!(n_tables > 0);
    }

    #[test]
    fn all_tiers_take_less_than_six_megabytes() {
        // Fewer tiers share less: of any of them the bound holds all the more.
        let bytes = ptx::embedded_bytes();
        assert!(bytes > 0 && bytes <= 6_000_000, "{bytes} bytes");
    }

    #[test]
    fn a_gpu_gets_the_best_tier_that_it_runs() {
        let tiers =
            |sm| ptx::modules_for(sm, "rms_norm_f32").iter().map(|module| module.tier).collect::<Vec<_>>();
        assert_eq!(tiers(90), ["sm_90a", "sm_89", "sm_80", "sm_75", "sm_70", "sm_61", "sm_50"]);
        assert_eq!(tiers(120).first(), Some(&"sm_89"));
        assert_eq!(tiers(60), ["sm_50"]);
    }

    #[test]
    fn the_emulator_needs_no_module() {
        let emulator = Emulator::new(Options::default());
        let mut modules = Modules::new();
        assert_eq!(modules.find_module(&emulator, "rms_norm_f32"), Ok(Emulator::MODULE));
        assert!(modules.missing(&emulator, ["rms_norm_f32"].into_iter()).is_empty());
        assert_eq!(modules.loaded().count(), 0);
    }

    /// A GPU's driver as far as modules go; all else is the emulator's.
    #[derive(Debug)]
    struct Loader {
        emulator: Emulator,
        loaded: Mutex<Vec<&'static str>>,
        unloaded: Mutex<Vec<ModuleId>>,
    }

    impl Driver for Loader {
        fn load(&self, module: &PtxModule) -> Result<ModuleId, DriverError> {
            let mut loaded = self.loaded.lock().unwrap();
            if module.entry == "rms_norm_f32" {
                return Err(DriverError::OutOfMemory { kind: MemKind::Device, bytes: 1 });
            }
            loaded.push(module.entry);
            Ok(ModuleId(loaded.len() as u32 - 1))
        }
        fn unload(&self, module: ModuleId) -> Result<(), DriverError> {
            self.unloaded.lock().unwrap().push(module);
            Ok(())
        }
        fn info(&self) -> DeviceInfo {
            self.emulator.info()
        }
        fn alloc(&self, kind: MemKind, bytes: u64) -> Result<DevicePtr, DriverError> {
            self.emulator.alloc(kind, bytes)
        }
        fn free(&self, at: DevicePtr) -> Result<(), DriverError> {
            self.emulator.free(at)
        }
        fn write(&self, to: DevicePtr, from: &[u8], stream: StreamId) -> Result<(), DriverError> {
            self.emulator.write(to, from, stream)
        }
        fn read(&self, to: &mut [u8], from: DevicePtr, stream: StreamId) -> Result<(), DriverError> {
            self.emulator.read(to, from, stream)
        }
        fn copy(&self, to: DevicePtr, from: DevicePtr, n: u64, stream: StreamId) -> Result<(), DriverError> {
            self.emulator.copy(to, from, n, stream)
        }
        fn fill(&self, at: DevicePtr, byte: u8, n: u64, stream: StreamId) -> Result<(), DriverError> {
            self.emulator.fill(at, byte, n, stream)
        }
        fn launch(&self, module: ModuleId, launch: &Launch, stream: StreamId) -> Result<(), DriverError> {
            self.emulator.launch(module, launch, stream)
        }
        fn create_stream(&self) -> Result<StreamId, DriverError> {
            self.emulator.create_stream()
        }
        fn synchronise(&self, stream: StreamId) -> Result<(), DriverError> {
            self.emulator.synchronise(stream)
        }
        fn record(&self, stream: StreamId) -> Result<EventId, DriverError> {
            self.emulator.record(stream)
        }
        fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
            self.emulator.wait(stream, event)
        }
        fn elapsed_ns(&self, from: EventId, to: EventId) -> Result<u64, DriverError> {
            self.emulator.elapsed_ns(from, to)
        }
        fn release(&self, event: EventId) -> Result<(), DriverError> {
            self.emulator.release(event)
        }
    }

    #[test]
    fn what_is_missing_is_loaded_once_and_kept() {
        let driver = Loader {
            emulator: Emulator::new(Options { sm: 90, ..Options::default() }),
            loaded: Mutex::default(),
            unloaded: Mutex::default(),
        };
        let mut modules = Modules::new();
        let wanted = ["kv_store", "rms_norm_f32", "flash_merge", "kv_store", "no_such_kernel"];
        let missing = modules.missing(&driver, wanted.into_iter());
        assert_eq!(missing.len(), 3);
        // Another plan is faster with one of them.
        let found = modules.find_module(&driver, "flash_merge").unwrap();
        (0..missing.len()).chain([0]).for_each(|i| missing.load(&driver, i));
        modules.keep(missing, &driver).unwrap();
        assert_eq!(*driver.loaded.lock().unwrap(), ["flash_merge", "kv_store", "flash_merge"]);
        assert_eq!(modules.find_module(&driver, "flash_merge"), Ok(found));
        assert_eq!(*driver.unloaded.lock().unwrap(), [ModuleId(2)]);
        assert_eq!(modules.find_module(&driver, "kv_store"), Ok(ModuleId(1)));
        // One that could not be loaded is asked for again, and the reason heard.
        assert!(matches!(modules.find_module(&driver, "rms_norm_f32"), Err(DriverError::OutOfMemory { .. })));
        assert_eq!(modules.missing(&driver, wanted.into_iter()).len(), 1);
    }
}
