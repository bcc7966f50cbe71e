//! Importance matrices: GGUF files made by llama-imatrix, with the sum of squares of each input column of each weight
//! (`NAME.in_sum2`) and how often it was summed (`NAME.counts`, one per expert).

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use engine::io::Mapped;
use engine::weights::ByteSource;
use gguf::{Gguf, TensorInfo, Value};
use quant::FormatId;

/// Column weights by tensor name, `n_expert · cols` each.
pub struct Imatrix {
    /// The weights.
    pub entries: BTreeMap<String, Vec<f32>>,
    /// First data set it was made with.
    pub dataset: Option<String>,
    /// Chunks of text it was made with.
    pub n_chunks: u32,
}

impl Imatrix {
    /// Reads a file.
    pub fn open(path: &Path) -> Result<Imatrix> {
        let map = Mapped::open(path)?;
        Self::parse(map.bytes()).with_context(|| format!("{}: importance matrix", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Imatrix> {
        let gguf = Gguf::parse(bytes)?;
        let dataset = match gguf.get("imatrix.datasets") {
            Some(Value::Array(names)) => {
                names.strs()?.next().map(|s| String::from_utf8_lossy(s).into_owned())
            }
            _ => bail!("imatrix.datasets is missing; is this a file of llama-imatrix?"),
        };
        let n_chunks = gguf.u32("imatrix.chunk_count")?;
        let mut entries = BTreeMap::new();
        for tensor in gguf.tensors() {
            let Some(name) = tensor.name.strip_suffix(".in_sum2") else { continue };
            let counts_name = format!("{name}.counts");
            let counts = gguf.tensor(&counts_name).with_context(|| format!("{counts_name} is missing"))?;
            let (sums, counts) = (floats(&gguf, tensor)?, floats(&gguf, counts)?);
            ensure!(
                !counts.is_empty() && sums.len() % counts.len() == 0,
                "{name}: {} sums for {} counts",
                sums.len(),
                counts.len()
            );
            entries.insert(name.to_owned(), means(&sums, &counts));
        }
        ensure!(!entries.is_empty(), "it holds no sums");
        let finite = entries.iter().find(|(_, e)| e.iter().any(|v| !v.is_finite()));
        if let Some((name, _)) = finite {
            bail!("{name}: a weight is not finite");
        }
        Ok(Imatrix { entries, dataset, n_chunks })
    }
}

/// Sums over counts; an expert that no token reached counts every column the same.
fn means(sums: &[f32], counts: &[f32]) -> Vec<f32> {
    let cols = sums.len() / counts.len();
    let of_expert = |(sums, count): (&[f32], &f32)| -> Vec<f32> {
        let count = count.round();
        sums.iter().map(|s| if count > 0.0 { s / count } else { 1.0 }).collect()
    };
    sums.chunks_exact(cols.max(1)).zip(counts).flat_map(of_expert).collect()
}

fn floats(gguf: &Gguf<'_>, tensor: &TensorInfo<'_>) -> Result<Vec<f32>> {
    ensure!(tensor.format == FormatId::F32, "{}: format {}, expected F32", tensor.name, tensor.format);
    let bytes = gguf.data(tensor);
    let mut out = vec![0.0; bytes.len() / size_of::<f32>()];
    quant::row::decode(FormatId::F32, bytes, &mut out)?;
    Ok(out)
}
