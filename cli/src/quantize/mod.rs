//! Making a file of other formats from a file: which format each tensor gets ([`mix`]), and writing it.
//!
//! The result equals llama-quantize's byte for byte: order of tensors and keys, formats, data. It goes to a temporary
//! file beside the target and is renamed when whole, so that a failure leaves nothing behind.

pub mod file_type;
pub mod imatrix;
pub mod mix;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use gguf::{SplitSet, TensorInfo, Value, Writer};
use quant::{FormatId, table};
use rayon::prelude::*;

use imatrix::Imatrix;
use mix::{Mixer, ModelFacts, Request};

/// Bytes of source and result held at once.
const SLAB_BYTES: usize = 64 << 20;

/// A whole job.
pub struct Job<'a> {
    /// The source, one file or all parts.
    pub source: &'a SplitSet<'a>,
    /// What is asked for.
    pub request: &'a Request,
    /// The importance matrix and its file's name as the user gave it.
    pub imatrix: Option<(&'a Imatrix, &'a str)>,
    /// Whether quantised tensors may be quantised again.
    pub allow_requantize: bool,
    /// One part for each part of the source.
    pub keep_split: bool,
}

/// What a job comes to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Bytes of all tensors before.
    pub bytes_before: u64,
    /// Bytes of all tensors after.
    pub bytes_after: u64,
    /// Weights.
    pub elems: u64,
    /// Tensors that got another format because their width did not fit.
    pub n_fallback: usize,
    /// Tensors.
    pub n_tensors: usize,
}

/// A tensor about to be written.
pub struct Progress<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its number, from 1.
    pub index: usize,
    /// Tensors in all.
    pub count: usize,
    /// Its format in the source.
    pub from: FormatId,
    /// Its new format.
    pub to: FormatId,
    /// Its bytes in the source.
    pub bytes: u64,
}

/// A tensor with its part and its new format.
struct Target<'a> {
    part: usize,
    tensor: &'a TensorInfo<'a>,
    format: FormatId,
}

impl Job<'_> {
    /// Writes the result; `progress` hears of each tensor before it is written and may end the job.
    pub fn run(&self, out: &Path, progress: &mut dyn FnMut(&Progress<'_>) -> Result<()>) -> Result<Totals> {
        let (targets, mut totals) = self.plan()?;
        let n_parts = if self.keep_split { self.source.parts().len() } else { 1 };
        let mut written: Vec<Temporary> = Vec::new();
        let mut index = 0;
        for part in 0..n_parts {
            let own: Vec<&Target<'_>> = targets.iter().filter(|t| n_parts == 1 || t.part == part).collect();
            let writer = self.header(part, n_parts, &own, targets.len())?;
            let path = part_path(out, part, n_parts)?;
            let temporary = Temporary::beside(&path)?;
            let mut file = BufWriter::with_capacity(1 << 20, &temporary.file);
            file.write_all(&writer.header_bytes())?;
            for target in own {
                index += 1;
                progress(&Progress {
                    name: target.tensor.name,
                    index,
                    count: targets.len(),
                    from: target.tensor.format,
                    to: target.format,
                    bytes: target.tensor.n_bytes(),
                })?;
                let n_bytes =
                    self.write_tensor(target, &mut file).with_context(|| target.tensor.name.to_owned())?;
                file.write_all(&vec![0; writer.padding(n_bytes) as usize])?;
                totals.bytes_after += n_bytes;
            }
            file.flush()?;
            drop(file);
            written.push(temporary);
        }
        for temporary in written {
            temporary.rename()?;
        }
        Ok(totals)
    }

    /// Every tensor's format, in the order of the result.
    fn plan(&self) -> Result<(Vec<Target<'_>>, Totals)> {
        let mut list: Vec<(usize, &TensorInfo<'_>)> = self.source.tensors().collect();
        if !self.keep_split {
            list.sort_by(|a, b| mix::file_order(a.1.name).cmp(&mix::file_order(b.1.name)));
        }
        let facts = self.facts()?.with_tensors(list.iter().map(|t| t.1.name));
        let mut mixer = Mixer::new(self.request, &facts);
        let mut totals = Totals { n_tensors: list.len(), ..Totals::default() };
        let mut targets = Vec::with_capacity(list.len());
        for (part, tensor) in list {
            let name = tensor.name;
            let format = mixer.choose(name, tensor.format, &tensor.ne()).with_context(|| name.to_owned())?;
            if format != tensor.format {
                self.check(name, tensor.format, format)?;
            }
            totals.bytes_before += tensor.n_bytes();
            totals.elems += tensor.n_elems();
            targets.push(Target { part, tensor, format });
        }
        totals.n_fallback = mixer.n_fallback;
        Ok((targets, totals))
    }

    fn check(&self, name: &str, from: FormatId, to: FormatId) -> Result<()> {
        if table::info(from).elems > 1 && !self.allow_requantize {
            bail!(
                "{name} is {from} already; quantising again loses more: say --allow-requantize, or start from F16"
            );
        }
        let has_row = self.imatrix.is_some_and(|(im, _)| im.entries.contains_key(name));
        if !has_row && mix::needs_imatrix(name, to, self.request.file_type) {
            bail!(
                "{name} would become {to}, which is garbage without an importance matrix: give one with --imatrix"
            );
        }
        Ok(())
    }

    fn facts(&self) -> Result<ModelFacts> {
        let meta = self.source.metadata();
        let arch = meta.str("general.architecture")?.to_owned();
        // One number, or one per layer: then the first speaks for all.
        let number = |key: &str| -> Result<Option<usize>> {
            let key = format!("{arch}.{key}");
            Ok(match meta.get(&key) {
                Some(Value::Array(view)) => view.u32s()?.next().map(|v| v as usize),
                _ => meta.opt_u32(&key)?.map(|v| v as usize),
            })
        };
        let n_head = number("attention.head_count")?.unwrap_or(1);
        let n_head_kv = number("attention.head_count_kv")?.unwrap_or(n_head);
        Ok(ModelFacts {
            n_layer: number("block_count")?.unwrap_or(0),
            n_gqa: n_head.checked_div(n_head_kv).unwrap_or(0),
            n_expert: number("expert_count")?.unwrap_or(0),
            has_imatrix: self.imatrix.is_some(),
            tied: true,
            n_value_tensors: 0,
            arch,
        })
    }

    /// Keys and tensors of a part: the source's keys, then those that say how it was quantised.
    fn header(
        &self,
        part: usize,
        n_parts: usize,
        targets: &[&Target<'_>],
        n_tensors: usize,
    ) -> Result<Writer> {
        const SPLIT_KEYS: [&str; 3] = ["split.no", "split.count", "split.tensors.count"];
        let mut writer = if part == 0 { Writer::like(self.source.metadata())? } else { Writer::default() };
        if part == 0 {
            // The version of the block layouts that ggml counts; it has been 2 since 2023.
            writer.set("general.quantization_version", 2u32)?;
            writer.set("general.file_type", self.request.file_type as u32)?;
            for key in SPLIT_KEYS {
                writer.remove(key);
            }
            if let Some((imatrix, name)) = self.imatrix {
                writer.set("quantize.imatrix.file", Value::Str(name.as_bytes()))?;
                if let Some(dataset) = &imatrix.dataset {
                    writer.set("quantize.imatrix.dataset", Value::Str(dataset.as_bytes()))?;
                }
                writer.set("quantize.imatrix.entries_count", imatrix.entries.len() as u32)?;
                if imatrix.n_chunks > 0 {
                    writer.set("quantize.imatrix.chunks_count", imatrix.n_chunks)?;
                }
            }
        }
        if n_parts > 1 {
            writer.set(SPLIT_KEYS[0], part as u16)?;
            writer.set(SPLIT_KEYS[1], n_parts as u16)?;
            writer.set(SPLIT_KEYS[2], n_tensors as i32)?;
        }
        for target in targets {
            writer.tensor(target.tensor.name, target.format, &target.tensor.ne())?;
        }
        Ok(writer)
    }

    /// Writes a tensor's data and returns how many bytes it takes.
    fn write_tensor(&self, target: &Target<'_>, file: &mut impl Write) -> Result<u64> {
        let (tensor, to) = (target.tensor, target.format);
        let data = self.source.data(target.part, tensor);
        if tensor.format == to {
            file.write_all(data)?;
            return Ok(data.len() as u64);
        }
        let ne = tensor.ne();
        let cols = ne[0] as usize;
        let rows_per_expert = ne.get(1).map_or(1, |&n| n as usize);
        let (row_from, row_to) =
            (quant::row::row_bytes(tensor.format, cols)?, quant::row::row_bytes(to, cols)?);
        let n_rows = data.len() / row_from;
        let importance = self.importance(tensor.name, cols, n_rows / rows_per_expert)?;
        let rows_per_slab = (SLAB_BYTES / (row_to + cols * size_of::<f32>())).clamp(1, n_rows);
        let mut slab = vec![0u8; rows_per_slab * row_to];
        for (i, rows) in data.chunks(rows_per_slab * row_from).enumerate() {
            let out = &mut slab[..rows.len() / row_from * row_to];
            let encode =
                |scratch: &mut Vec<f32>, (r, (from, to_bytes)): (usize, (&[u8], &mut [u8]))| -> Result<()> {
                    scratch.resize(cols, 0.0);
                    quant::row::decode(tensor.format, from, scratch)?;
                    let expert = (i * rows_per_slab + r) / rows_per_expert;
                    let weights = importance.map(|w| &w[expert * cols..][..cols]);
                    Ok(quant::row::encode(to, scratch, weights, to_bytes)?)
                };
            rows.par_chunks_exact(row_from)
                .zip(out.par_chunks_exact_mut(row_to))
                .enumerate()
                .map_init(Vec::new, encode)
                .collect::<Result<()>>()?;
            file.write_all(out)?;
        }
        Ok((n_rows * row_to) as u64)
    }

    fn importance(&self, name: &str, cols: usize, n_expert: usize) -> Result<Option<&[f32]>> {
        let Some(row) = self.imatrix.and_then(|(im, _)| im.entries.get(name)) else { return Ok(None) };
        if row.len() == cols * n_expert {
            return Ok(Some(row));
        }
        // A table of embeddings may have been measured as an output with other columns; it can do without.
        ensure!(
            matches!(name, "token_embd.weight" | "per_layer_token_embd.weight"),
            "the importance matrix has {} weights, expected {} for {name}",
            row.len(),
            cols * n_expert
        );
        Ok(None)
    }
}

/// Path of a part of the result.
pub fn part_path(out: &Path, part: usize, n_parts: usize) -> Result<PathBuf> {
    if n_parts == 1 {
        return Ok(out.to_owned());
    }
    let name = out.file_name().and_then(|n| n.to_str()).context("the output has no file name")?;
    let prefix = name.strip_suffix(".gguf").unwrap_or(name);
    Ok(out.with_file_name(gguf::split::part_name(prefix, part as u16, n_parts as u16)))
}

/// A file beside its target that disappears unless it is renamed.
pub struct Temporary {
    /// To be written.
    pub file: File,
    path: PathBuf,
    target: PathBuf,
    renamed: bool,
}

impl Temporary {
    /// An empty file in the target's folder. A link stays, what it points to is replaced; a device, a pipe or a folder is
    /// an error, since renaming would put a file in its place: `/dev/null` for whoever may do that.
    pub fn beside(target: &Path) -> Result<Temporary> {
        let real = std::fs::canonicalize(target);
        let target = real.as_deref().unwrap_or(target);
        let is_other = std::fs::metadata(target).is_ok_and(|found| !found.is_file());
        ensure!(!is_other, "{}: is there and no regular file", target.display());
        let name = target.file_name().with_context(|| format!("{}: no file name", target.display()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.part", std::process::id()));
        let path = target.with_file_name(hidden);
        let file = File::create_new(&path).with_context(|| format!("{}: cannot create", path.display()))?;
        Ok(Temporary { file, path, target: target.to_owned(), renamed: false })
    }

    /// Makes it the target.
    pub fn rename(mut self) -> Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, &self.target)
            .with_context(|| format!("{}: cannot create", self.target.display()))?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Best effort: there is nobody left to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
