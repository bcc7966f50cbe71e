//! Where the model's bytes come from: a boot module, a mapped file (virtio-pmem), or a disk.

use alloc::sync::Arc;
use alloc::vec;
use core::fmt;

use engine::weights::ByteSource;
use engine::{EngineError, Model};
use uk_kernel::devices::Devices;
use uk_kernel::disk::{self, DiskError};
use uk_kernel::options::ModelSource;

/// Why there is no model.
#[derive(Debug)]
pub enum ModelError {
    /// The source has none.
    Missing {
        /// Where it was looked for.
        source: ModelSource,
    },
    /// The disk cannot be read.
    Disk(DiskError),
    /// The bytes are no model that we run.
    Engine(EngineError),
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelError::Missing { source } => {
                write!(f, "no model (model={source}): give it as a boot module, by virtio-pmem or on a disk")
            }
            ModelError::Disk(error) => error.fmt(f),
            ModelError::Engine(error) => write!(f, "the model: {error}"),
        }
    }
}

impl core::error::Error for ModelError {}

/// Loads the model from where the options say. Modules and mapped files are used where they lie.
pub fn load(
    source: ModelSource,
    modules: &[&'static [u8]],
    devices: &mut Devices,
) -> Result<Model, ModelError> {
    let wanted = |one: ModelSource| source == ModelSource::Auto || source == one;
    let in_place = wanted(ModelSource::Module).then_some(modules).into_iter().flatten();
    let in_place = in_place.chain(wanted(ModelSource::Pmem).then_some(&devices.files).into_iter().flatten());
    let bytes: Arc<dyn ByteSource> = match in_place.copied().next() {
        Some(bytes) => Arc::new(bytes),
        None => {
            let disk = wanted(ModelSource::Disk).then(|| devices.disk.pop()).flatten();
            let disk = disk.ok_or(ModelError::Missing { source })?;
            Arc::new(disk::read(disk).map_err(ModelError::Disk)?)
        }
    };
    Model::load(vec![bytes]).map_err(ModelError::Engine)
}
