//! Model files: opened in place through the page cache, parts of a split set found beside the first.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use engine::io::Mapped;
use engine::weights::ByteSource;
use engine::{Context, ContextParams, Model};

use crate::args::EngineArgs;
use crate::device::Compute;
use crate::{machine, ui};

/// Context size if neither the user nor the model asks for less.
const DEFAULT_CTX: usize = 4096;

/// A file of this size takes long enough to read for a progress bar.
const BAR_FROM_BYTES: usize = 256 << 20;

/// The mapped files of a model, in order.
pub struct Files {
    /// One, or all parts.
    pub parts: Vec<Arc<Mapped>>,
    /// Where they are.
    pub paths: Vec<PathBuf>,
}

impl Files {
    /// Opens a file, or all parts of the set that its name belongs to.
    pub fn open(path: &Path) -> Result<Files> {
        let paths = parts_of(path);
        let mut parts = Vec::with_capacity(paths.len());
        for part in &paths {
            let mapped = match Mapped::open(part) {
                Ok(mapped) => mapped,
                Err(e) if part != path => bail!("{e} (one of {} parts of {})", paths.len(), path.display()),
                Err(e) if !path.exists() && looks_like_repository(path) => {
                    bail!("{e}; to fetch it from Hugging Face: runik pull {}", path.display())
                }
                Err(e) => return Err(e.into()),
            };
            let magic = &mapped.bytes()[..mapped.bytes().len().min(4)];
            if magic != b"GGUF" {
                bail!("{}: not a GGUF file (it starts with {magic:02x?}, expected \"GGUF\")", part.display());
            }
            parts.push(Arc::new(mapped));
        }
        Ok(Files { parts, paths })
    }

    /// All bytes.
    pub fn total_bytes(&self) -> usize {
        self.parts.iter().map(|p| p.bytes().len()).sum()
    }

    /// The parsed parts.
    pub fn parse(&self) -> Result<gguf::SplitSet<'_>> {
        let mut parsed = Vec::with_capacity(self.parts.len());
        for (part, path) in self.parts.iter().zip(&self.paths) {
            parsed.push(gguf::Gguf::parse(part.bytes()).with_context(|| path.display().to_string())?);
        }
        gguf::SplitSet::new(parsed).with_context(|| self.paths[0].display().to_string())
    }

    /// Asks the system to read ahead what is not in memory yet.
    pub fn read_ahead(&self) {
        self.parts.iter().for_each(|p| p.read_ahead());
    }

    /// Waits for what is not in memory yet, with a bar, where there is a terminal to show it. Not for a GPU, which has a bar
    /// of its own and reads faster than the pages can be touched one by one.
    pub fn warm_up(&self, compute: &Compute) {
        const CHUNK: usize = 4 << 20;
        if self.total_bytes() < BAR_FROM_BYTES || !ui::fancy() || compute.has_gpu() {
            return;
        }
        let bar = ui::bytes_bar(self.total_bytes() as u64, "loading");
        for chunk in self.parts.iter().flat_map(|p| p.bytes().chunks(CHUNK)) {
            // One byte of each page brings the page in.
            std::hint::black_box(chunk.iter().step_by(4096).fold(0u8, |sum, b| sum ^ b));
            bar.inc(chunk.len() as u64);
        }
        bar.finish_and_clear();
    }

    /// The model in these files.
    pub fn model(&self) -> Result<Model> {
        let sources = self.parts.iter().map(|p| p.clone() as Arc<dyn ByteSource>).collect();
        Model::load(sources).with_context(|| self.paths[0].display().to_string())
    }

    /// Only the vocabulary of these files; the weights may be of any kind.
    pub fn tokenizer(&self) -> Result<engine::Tokenizer> {
        let name = || self.paths[0].display().to_string();
        let first = gguf::Gguf::parse(self.parts[0].bytes()).with_context(name)?;
        engine::Tokenizer::from_gguf(&first).with_context(name)
    }
}

/// All parts of the set that a file's name says it belongs to; the file itself if it says none.
fn parts_of(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    match gguf::split::parse_part_name(name) {
        Some((prefix, _, count)) => {
            (0..count).map(|no| path.with_file_name(gguf::split::part_name(prefix, no, count))).collect()
        }
        None => vec![path.to_owned()],
    }
}

/// `user/name`, perhaps with `:QUANT`: two parts, none of them a folder here.
fn looks_like_repository(path: &Path) -> bool {
    let parts: Vec<_> = path.components().collect();
    parts.len() == 2 && path.is_relative() && path.extension().is_none_or(|e| e != "gguf")
}

/// A model ready to run, with what the user should know.
pub struct Loaded {
    /// The model.
    pub model: Arc<Model>,
    /// A context of the size asked for.
    pub context: Context,
    /// What computes it.
    pub compute: Compute,
    /// Time to open, parse and prepare.
    pub load_ms: f64,
}

impl EngineArgs {
    /// Opens a model; `default_ctx` where the user names no size (`None`: the model's, bounded).
    pub fn open(&self, path: &Path, default_ctx: Option<usize>) -> Result<Loaded> {
        self.open_with(path, default_ctx, |_| ContextParams::default())
    }

    /// [`EngineArgs::open`] with what flags do not say: sequences, and whether it is for embeddings.
    pub fn open_with(
        &self,
        path: &Path,
        default_ctx: Option<usize>,
        base: impl FnOnce(&Model) -> ContextParams,
    ) -> Result<Loaded> {
        let started = Instant::now();
        let open = || {
            let files = Files::open(path)?;
            files.read_ahead();
            Ok::<_, anyhow::Error>((files.model()?, files))
        };
        // A GPU's driver takes longer to start than a vocabulary to read, and neither needs the other.
        let (opened, compute) = std::thread::scope(|scope| {
            let opened = scope.spawn(open);
            let compute = Compute::choose(&self.placement);
            (opened.join().unwrap_or_else(|panic| resume_unwind(panic)), compute)
        });
        let compute = compute?;
        let (model, files) = opened?;
        files.warm_up(&compute);
        let model = Arc::new(model);
        let threads = machine::threads(self.threads)?;
        let n_ctx = context_size(self.ctx_size.or(default_ctx), &model)?;
        let params = self.params(&model, &compute, n_ctx, base(&model));
        let (backend, context) = context(&model, params, &compute, threads)?;
        let load_ms = ui::ms(started.elapsed());
        ui::detail(format!(
            "{} on {backend} with {threads} thread(s), context {} of {}, loaded in {load_ms:.0} ms",
            model.arch_name(),
            context.n_ctx(),
            model.hparams().n_ctx_train,
        ));
        Ok(Loaded { model, context, compute, load_ms })
    }

    /// A context's parameters: what the flags say, and the rest from `base`.
    pub fn params(
        &self,
        model: &Model,
        compute: &Compute,
        n_ctx: usize,
        base: ContextParams,
    ) -> ContextParams {
        ContextParams {
            n_ctx,
            // Without a causal mask a text must fit one step.
            n_ubatch: if model.hparams().causal { compute.batch_size(self.batch_size) } else { n_ctx },
            type_k: self.cache_type_k,
            type_v: self.cache_type_v,
            ..base
        }
    }
}

/// The backend's name and a context on it.
pub fn context(
    model: &Arc<Model>,
    params: ContextParams,
    compute: &Compute,
    threads: usize,
) -> Result<(&'static str, Context)> {
    let backend = compute.backend(model, &params, threads)?;
    let name = backend.info().name;
    Ok((name, Context::new(model.clone(), backend, params)?))
}

/// The context size in use: what the user says (0 = the model's), else the model's up to a bound.
pub fn context_size(asked: Option<usize>, model: &Model) -> Result<usize> {
    let trained = model.hparams().n_ctx_train;
    let size = match asked {
        None => trained.min(DEFAULT_CTX),
        Some(0) => trained,
        Some(n) => n,
    };
    if size > trained {
        ui::say(format!(
            "context {size} is longer than the {trained} positions that the model was trained with"
        ));
    }
    Ok(size)
}
