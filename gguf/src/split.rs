//! Models in several files, after llama.cpp's gguf-split: part `no` (from 0) of `count` is named
//! `PREFIX-%05d-of-%05d.gguf` with `no + 1`, and says so in `split.no`, `split.count` and `split.tensors.count`. The
//! first part holds the metadata; tensors are spread over all.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::error::{GgufError, SplitProblem, TensorProblem};
use crate::file::Gguf;
use crate::tensor_info::TensorInfo;

/// What a part says about the set it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitInfo {
    /// This part, from 0.
    pub no: u16,
    /// Number of parts.
    pub count: u16,
    /// Tensors in all parts, if it says.
    pub n_tensors: Option<u64>,
}

impl SplitInfo {
    /// `None` for a file that is whole: without `split.count`, or with a count of 0 or 1, as llama.cpp reads it.
    pub fn of(gguf: &Gguf<'_>) -> Result<Option<SplitInfo>, GgufError> {
        let Some(count) = gguf.opt_number::<u16>("split.count")?.filter(|&count| count > 1) else {
            return Ok(None);
        };
        Ok(Some(SplitInfo {
            no: gguf.number("split.no")?,
            count,
            n_tensors: gguf.opt_u64("split.tensors.count")?,
        }))
    }
}

/// File name of part `no` (from 0) of `count`.
pub fn part_name(prefix: &str, no: u16, count: u16) -> String {
    format!("{prefix}-{:05}-of-{count:05}.gguf", u32::from(no) + 1)
}

/// Prefix, part (from 0) and count of a part's file name; `None` if it is no such name.
pub fn parse_part_name(name: &str) -> Option<(&str, u16, u16)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, no) = rest.rsplit_once('-')?;
    let number = |digits: &str| {
        let all_digits = digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit());
        all_digits.then(|| digits.parse::<u16>().ok())?
    };
    let (no, count) = (number(no)?.checked_sub(1)?, number(count)?);
    (no < count && !prefix.is_empty()).then_some((prefix, no, count))
}

/// All parts of a model (or its one whole file), with one index over their tensors.
#[derive(Clone, Debug)]
pub struct SplitSet<'a> {
    parts: Vec<Gguf<'a>>,
    /// (part, place in its tensors), sorted by name.
    by_name: Vec<(u32, u32)>,
}

impl<'a> SplitSet<'a> {
    /// Takes the parts in order and checks that they are one whole set.
    pub fn new(parts: Vec<Gguf<'a>>) -> Result<Self, GgufError> {
        let split = parts.first().map(SplitInfo::of).transpose()?.flatten();
        let count = split.map_or(1, |split| split.count);
        if parts.len() != usize::from(count) {
            let problem = SplitProblem::Count { expected: count.into(), got: parts.len() as u64 };
            return Err(GgufError::Split { part: 0, problem });
        }
        for (part, gguf) in parts.iter().enumerate().filter(|_| count > 1) {
            let check = |ok: bool, problem| if ok { Ok(()) } else { Err(GgufError::Split { part, problem }) };
            let no = gguf.u64("split.no")?;
            let own_count = gguf.u64("split.count")?;
            check(no == part as u64, SplitProblem::Number { expected: part as u64, got: no })?;
            check(
                own_count == u64::from(count),
                SplitProblem::Count { expected: own_count, got: count.into() },
            )?;
            check(gguf.endian() == parts[0].endian(), SplitProblem::Endian)?;
        }
        let n_tensors = parts.iter().map(|gguf| gguf.tensors().len() as u64).sum();
        if let Some(expected) = split.and_then(|split| split.n_tensors).filter(|&n| n != n_tensors) {
            let problem = SplitProblem::Tensors { expected, got: n_tensors };
            return Err(GgufError::Split { part: 0, problem });
        }

        let mut by_name = Vec::new();
        by_name.reserve_exact(n_tensors as usize);
        for (part, gguf) in (0u32..).zip(&parts) {
            by_name.extend((0..gguf.tensors().len() as u32).map(|i| (part, i)));
        }
        let at = |&(part, i): &(u32, u32)| &parts[part as usize].tensors()[i as usize];
        by_name.sort_unstable_by_key(|place| (at(place).name, *place));
        if let Some(pair) = by_name.windows(2).find(|pair| at(&pair[0]).name == at(&pair[1]).name) {
            return Err(at(&pair[1]).error(0, TensorProblem::Duplicate));
        }
        Ok(SplitSet { parts, by_name })
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Gguf<'a>] {
        &self.parts
    }

    /// The part that holds the model's metadata: the first.
    pub fn metadata(&self) -> &Gguf<'a> {
        &self.parts[0]
    }

    /// Tensors in all parts.
    pub fn n_tensors(&self) -> usize {
        self.by_name.len()
    }

    /// All tensors with their parts, by part and in file order.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo<'a>)> {
        self.parts.iter().enumerate().flat_map(|(part, gguf)| gguf.tensors().iter().map(move |t| (part, t)))
    }

    /// The tensor with this name, and its part.
    pub fn tensor(&self, name: &str) -> Option<(usize, &TensorInfo<'a>)> {
        let at = |&(part, i): &(u32, u32)| &self.parts[part as usize].tensors()[i as usize];
        let place = self.by_name.binary_search_by(|place| at(place).name.cmp(name)).ok()?;
        Some((self.by_name[place].0 as usize, at(&self.by_name[place])))
    }

    /// The data of a tensor of part `part`.
    ///
    /// # Panics
    /// If the tensor is not of that part.
    pub fn data(&self, part: usize, tensor: &TensorInfo<'_>) -> &'a [u8] {
        self.parts[part].data(tensor)
    }
}
