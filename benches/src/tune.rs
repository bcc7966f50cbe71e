//! Which cut of a quantised product is fastest, beside the one that is chosen, and the costs by which the right one would be.
//!
//! Every candidate of every problem in `mmq/tuning.rs` is timed, but for those expected to take more than
//! [`HOPELESS`] times as long as another. The weights come from memory; all candidates of a shape work on the same buffers.
//! What is printed ends with rows for the table in `mmq/costs.rs`, which says when one is justified.

pub mod fit;

use gpu_kernels::case::Random;
use gpu_kernels::driver::{DeviceInfo, Driver};
use gpu_kernels::kernels::mmq::costs::Costs;
use gpu_kernels::kernels::mmq::tuning::{COLUMNS, SHAPES, Shape};
use gpu_kernels::kernels::mmq::{Cut, Hopper, Narrow};
use gpu_kernels::kernels::quantise_act;
use gpu_kernels::modules::Modules;
use quant::FormatId;
use serde_json::{Value, json};

use crate::BenchError;
use crate::bench;
use crate::options::{Options, write};
use crate::row::round;
use crate::timing::{Effort, Sets};
use fit::{HOPPER_FROM, Losses, MOST_LOSS, Measured, Timed};

/// The formats of most model files.
const FORMATS: [FormatId; 15] = [
    FormatId::Q4_0,
    FormatId::Q4_1,
    FormatId::Q5_0,
    FormatId::Q5_1,
    FormatId::Q8_0,
    FormatId::Q2_K,
    FormatId::Q3_K,
    FormatId::Q4_K,
    FormatId::Q5_K,
    FormatId::Q6_K,
    FormatId::IQ4_NL,
    FormatId::IQ4_XS,
    FormatId::IQ3_XXS,
    FormatId::IQ2_XXS,
    FormatId::MXFP4,
];

/// The format whose row is the family's.
const FAMILY_FORMAT: FormatId = FormatId::Q4_0;

/// Cuts expected to take this many times as long as the best are not timed: estimates are not that wrong.
const HOPELESS: f64 = 2.5;

/// A format's problems and what follows from them.
struct Tuned {
    format: FormatId,
    problems: Vec<Timed>,
    /// By the rule as it is.
    now: Losses,
    /// As measured.
    medians: Costs,
    /// The same, moved to where less is lost.
    fitted: Costs,
    /// By the fitted costs.
    then: Losses,
}

/// Times and fits the formats, given as `Q4_0,Q6_K`, or those of most files; prints what comes of it. A format that fails
/// is printed as such and counted.
pub fn run(driver: &dyn Driver, formats: Option<&str>, options: &Options) -> Result<(), BenchError> {
    let formats = formats.map_or(Ok(FORMATS.to_vec()), parse)?;
    let info = driver.info();
    let mut modules = options.tier.map_or_else(Modules::new, Modules::of_tier);
    println!("{}, sm_{}, {} SMs, {} MHz", info.name, info.sm, info.n_sm, info.clock_khz / 1000);
    println!("{}", header());
    let (mut tuned, mut failed) = (Vec::new(), 0);
    for format in formats {
        match tune(driver, &mut modules, format) {
            Ok(one) => {
                println!("{}", summary(&one));
                tuned.push(one);
            }
            Err(error) => {
                failed += 1;
                println!("{format}: FAILED: {error}");
            }
        }
    }
    println!();
    for one in &tuned {
        println!("{}", summary(one));
    }
    println!("\nmedians:");
    for one in &tuned {
        println!("{:<8} {:?}", one.format.name(), one.medians);
    }
    println!(
        "\nrows for {} (sm_{}) in mmq/costs.rs, those that are not justified as comments:",
        info.name, info.sm
    );
    for row in rows(&tuned, &info) {
        println!("{row}");
    }
    if let Some(path) = &options.json {
        write(path, &record(&info, &tuned))?;
    }
    if failed == 0 { Ok(()) } else { Err(BenchError::Failed { failed }) }
}

fn parse(names: &str) -> Result<Vec<FormatId>, BenchError> {
    let format = |name: &str| {
        let format = FormatId::from_name(name).filter(|format| quantise_act::kind(*format).is_some());
        format.ok_or_else(|| BenchError::Usage(format!("--tune {name}: no format of quantised weights")))
    };
    names.split(',').map(format).collect()
}

fn tune(driver: &dyn Driver, modules: &mut Modules, format: FormatId) -> Result<Tuned, BenchError> {
    let device = driver.info();
    let mut problems = Vec::new();
    for shape in SHAPES {
        let sets = Sets::new(driver, &shape.buffers(format, &mut Random::for_timing(1)), false)?;
        for &n_cols in COLUMNS {
            let timed = time(&sets, modules, format, *shape, n_cols, &device)?;
            println!("{}", line(format, &timed, chosen(format, shape, n_cols, &device)));
            problems.push(timed);
        }
    }
    let costs = Costs::find(format, &device);
    let measured = Measured { format, device: &device, problems: &problems };
    let (now, medians) = (measured.losses(costs), measured.medians(costs));
    let fitted = measured.fit(costs);
    let then = measured.losses(fitted);
    Ok(Tuned { format, problems, now, medians, fitted, then })
}

fn chosen(format: FormatId, shape: &Shape, n_cols: usize, device: &DeviceInfo) -> Cut {
    Cut::choose(format, shape.all_rows(), n_cols, shape.gated, device)
}

/// Times a problem's candidates; those that lose much, and the fastest, a second time, since anything may disturb one.
fn time(
    sets: &Sets<'_>,
    modules: &mut Modules,
    format: FormatId,
    shape: Shape,
    n_cols: usize,
    device: &DeviceInfo,
) -> Result<Timed, BenchError> {
    let mut ns = |cut| -> Result<f64, BenchError> {
        Ok(sets.time(modules, &shape.launches(format, cut, n_cols), Effort::QUICK)?.ns)
    };
    let mut cuts = Vec::new();
    for cut in worth_timing(format, shape, n_cols, device) {
        cuts.push((cut, ns(cut)?));
    }
    let mut timed = Timed { shape, n_cols, cuts };
    let (rule, (best, _)) = (chosen(format, &shape, n_cols, device), timed.best());
    if timed.loss_of(rule) > MOST_LOSS {
        for (cut, before) in timed.cuts.iter_mut().filter(|(cut, _)| *cut == rule || *cut == best) {
            *before = before.min(ns(*cut)?);
        }
    }
    Ok(timed)
}

/// The candidates, whichever the rule considers, but for the hopeless.
fn worth_timing(format: FormatId, shape: Shape, n_cols: usize, device: &DeviceInfo) -> Vec<Cut> {
    let costs = Costs { hopper_from: HOPPER_FROM[0], ..Costs::find(format, device) };
    let all = || Cut::candidates(format, shape.all_rows(), n_cols, shape.gated, device, costs);
    let least = all().map(|one| one.cycles).min().unwrap_or(0) as f64;
    let rule = chosen(format, &shape, n_cols, device);
    let worth = all().filter(|one| one.cut == rule || one.cycles as f64 <= HOPELESS * least);
    worth.map(|one| one.cut).collect()
}

fn header() -> String {
    let columns = ["format", "product", "cols", "chosen", "us", "fastest", "us", "loss %"];
    let [format, product, cols, chosen, us, fastest, best_us, loss] = columns;
    format!("{format:<8} {product:<22} {cols:>4}  {chosen:<26} {us:>9}  {fastest:<26} {best_us:>9} {loss:>7}")
}

/// A problem under [`header`], marked where it loses too much.
fn line(format: FormatId, timed: &Timed, rule: Cut) -> String {
    let (best, best_ns) = timed.best();
    let loss = timed.loss_of(rule);
    format!(
        "{:<8} {:<22} {:>4}  {:<26} {:>9.2}  {:<26} {:>9.2} {:>7.1}{}",
        format.name(),
        timed.shape,
        timed.n_cols,
        name(rule),
        timed.ns(rule).unwrap_or(f64::NAN) / 1e3,
        name(best),
        best_ns / 1e3,
        100.0 * loss,
        if loss > MOST_LOSS { " <" } else { "" },
    )
}

fn name(cut: Cut) -> String {
    match cut {
        Cut::Narrow(Narrow { cols, warps, row_tiles }) => {
            format!("narrow {cols}, {warps} warps{}", if row_tiles == 2 { ", paired" } else { "" })
        }
        Cut::Hopper(Hopper { cols, .. }) => format!("hopper {cols}"),
        Cut::Wide => "wide".into(),
    }
}

fn summary(tuned: &Tuned) -> String {
    let n = tuned.problems.len();
    let losses = |losses: Losses| {
        let Losses { n_over, worst: (worst, at), total } = losses;
        let Timed { shape, n_cols, .. } = &tuned.problems[at];
        let (worst, mean) = (100.0 * worst, 100.0 * total / n as f64);
        let percent = 100.0 * MOST_LOSS;
        format!(
            "{n_over} of {n} lose over {percent} %, worst {worst:.1} % ({shape}, {n_cols}), mean {mean:.2} %"
        )
    };
    let (now, then) = (losses(tuned.now), losses(tuned.then));
    format!("{:<8} {now}; with the fitted row {then}", tuned.format.name())
}

/// The table: the family's row, which is that of Q4_0 if it was timed, and the others, as comments where the family's loses
/// nowhere too much.
fn rows(tuned: &[Tuned], device: &DeviceInfo) -> Vec<String> {
    let of_family = tuned.iter().find(|one| one.format == FAMILY_FORMAT);
    let family = of_family.map_or(Costs::find_family(device), |one| one.fitted);
    let mut rows = vec![format!("default: {family:?},")];
    for Tuned { format, problems, fitted, .. } in tuned.iter().filter(|one| one.format != FAMILY_FORMAT) {
        let lost = Measured { format: *format, device, problems }.losses(family);
        let mark = if lost.n_over > 0 { "" } else { "// " };
        rows.push(format!("{mark}(FormatId::{format:?}, {fitted:?}),"));
    }
    rows
}

fn record(info: &DeviceInfo, tuned: &[Tuned]) -> Value {
    let of_problem = |format: FormatId, timed: &Timed| {
        let rule = chosen(format, &timed.shape, timed.n_cols, info);
        let cuts = timed.cuts.iter().map(|&(cut, ns)| json!({ "cut": name(cut), "us": round(ns / 1e3) }));
        json!({
            "format": format.name(),
            "rows": timed.shape.n_rows,
            "k": timed.shape.k,
            "gated": timed.shape.gated,
            "cols": timed.n_cols,
            "chosen": name(rule),
            "fastest": name(timed.best().0),
            "loss": round(timed.loss_of(rule)),
            "cuts": cuts.collect::<Vec<_>>(),
        })
    };
    let timed = tuned.iter().flat_map(|one| one.problems.iter().map(move |timed| (one.format, timed)));
    let mut record = bench::head(info);
    record["rows"] = timed.map(|(format, timed)| of_problem(format, timed)).collect();
    record["costs"] = json!(rows(tuned, info));
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_name() {
        assert_eq!(parse("q4_0,IQ4_NL").unwrap(), [FormatId::Q4_0, FormatId::IQ4_NL]);
        assert!(parse("Q4_0,F16").is_err() && parse("").is_err());
    }

    #[test]
    fn a_row_is_justified_where_the_familys_loses() {
        let device = DeviceInfo { sm: 80, smem_per_cta_bytes: 160 << 10, ..DeviceInfo::default() };
        let costs = Costs::find_family(&device);
        let losses = |n_over, total| Losses { n_over, worst: (total, 0), total };
        // At this shape the family chooses a narrow cut of 16 columns.
        let tuned = |format, narrow_16| Tuned {
            format,
            problems: vec![Timed {
                shape: SHAPES[0],
                n_cols: 9,
                cuts: vec![(Cut::NARROW_16, narrow_16), (Cut::NARROW_32, 1e4)],
            }],
            now: losses(1, 0.1),
            medians: costs,
            fitted: Costs { wide: 1, ..costs },
            then: losses(0, 0.01),
        };
        let all = [tuned(FormatId::Q4_0, 1e4), tuned(FormatId::Q8_0, 1.04e4), tuned(FormatId::Q6_K, 1.06e4)];
        let [family, own, justified] = &rows(&all, &device)[..] else { panic!("a row each") };
        assert!(family.starts_with("default: Costs { alone: [830, 1230, 1930], paired: ["), "{family}");
        assert!(own.starts_with("// (FormatId::Q8_0, Costs {"), "{own}");
        assert!(justified.starts_with("(FormatId::Q6_K, Costs {"), "{justified}");
        // Without Q4_0 the present row of the family decides.
        let [family, _] = &rows(&all[2..], &device)[..] else { panic!("a row each") };
        assert_eq!(*family, format!("default: {costs:?},"));
        assert!(summary(&all[0]).contains("1 of 1 lose over 5 %, worst 10.0 % (4096×14336, 9)"));
        assert!(line(FormatId::Q4_0, &all[0].problems[0], Cut::NARROW_16).ends_with(" 0.0"));
    }
}
