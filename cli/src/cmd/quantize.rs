//! `quantize`: the job of [`crate::quantize`] with its flags, progress and Ctrl-C.

use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use gguf::Endian;

use crate::args::QuantizeArgs;
use crate::exit::{Interrupted, usage};
use crate::load::Files;
use crate::quantize::imatrix::Imatrix;
use crate::quantize::mix::Request;
use crate::quantize::{Job, part_path};
use crate::{machine, ui};

/// The byte order that formats are encoded and decoded in.
const NATIVE: Endian = if cfg!(target_endian = "big") { Endian::Big } else { Endian::Little };

/// `quantize`.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    let threads = machine::threads(args.threads)?;
    let files = Files::open(&args.input)?;
    let n_parts = if args.keep_split { files.paths.len() } else { 1 };
    for part in 0..n_parts {
        let target = part_path(&args.output, part, n_parts)?.canonicalize().ok();
        for path in &files.paths {
            if target.is_some() && path.canonicalize().ok() == target {
                return Err(usage(format!("{}: input and output are the same file", path.display())));
            }
        }
    }
    let source = files.parse()?;
    if source.metadata().endian() != NATIVE {
        bail!(
            "{}: data in the other byte order; convert it on a machine of that order",
            args.input.display()
        );
    }
    let request = Request {
        file_type: args.file_type,
        pure: args.pure,
        leave_output_tensor: args.leave_output_tensor,
        output_tensor_type: args.output_tensor_type,
        token_embedding_type: args.token_embedding_type,
        tensor_types: args.tensor_type.clone(),
    };
    let imatrix = args.imatrix.as_deref().map(Imatrix::open).transpose()?;
    let imatrix_name = args.imatrix.as_deref().map(|p| p.display().to_string()).unwrap_or_default();
    let job = Job {
        source: &source,
        request: &request,
        imatrix: imatrix.as_ref().map(|im| (im, imatrix_name.as_str())),
        allow_requantize: args.allow_requantize,
        keep_split: args.keep_split,
    };
    let interrupt = ui::watch_interrupts()?;
    let bar = ui::bytes_bar(source.tensors().map(|(_, t)| t.n_bytes()).sum(), "quantising");
    let started = Instant::now();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("threads")?;
    let result = pool.install(|| {
        job.run(&args.output, &mut |step| {
            bar.inc(step.bytes);
            ui::detail(format!(
                "[{:>4}/{:>4}] {} {} -> {}",
                step.index, step.count, step.name, step.from, step.to
            ));
            if interrupt.load(Ordering::Relaxed) { Err(Interrupted.into()) } else { Ok(()) }
        })
    });
    bar.finish_and_clear();
    let totals = result?;
    let bpw = |bytes: u64| bytes as f64 * 8.0 / totals.elems.max(1) as f64;
    ui::say(format!(
        "{}: {} tensors, {} ({:.2} bits per weight) -> {} ({:.2}) in {:.1} s",
        args.output.display(),
        totals.n_tensors,
        ui::bytes(totals.bytes_before),
        bpw(totals.bytes_before),
        ui::bytes(totals.bytes_after),
        bpw(totals.bytes_after),
        started.elapsed().as_secs_f64(),
    ));
    if totals.n_fallback > 0 {
        let (n, all) = (totals.n_fallback, totals.n_tensors);
        ui::say(format!("{n} of {all} tensors have rows that the format does not fit; they got another"));
    }
    Ok(())
}
