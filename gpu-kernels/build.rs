//! Embeds the kernels as PTX: a row for each entry and tier, which is what is loaded at a time, and an entry's text for all
//! tiers in one file, packed and deflated. Tiers differ little, and much of a tier's text is another's.
//!
//! With the feature `ptx` and a device compiler; else the table is empty, and with the feature one warning names the
//! command that installs a compiler. The compiler's own files live in `target/ptx`, shared with xtask.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ptx_build::{CHECKS, Compiler, Entry, INSTALL_COMMAND, Kernels, Module, PtxError, TIERS, Tier};
use ptx_pack::Book;

/// Names of tiers, separated by commas.
const TIERS_VARIABLE: &str = "RUNIK_PTX_TIERS";

fn main() {
    for cfg in Tier::all_cfgs() {
        println!("cargo::rustc-check-cfg=cfg({cfg})");
    }
    println!("cargo::rustc-check-cfg=cfg(entries_of, values(any()))");
    println!("cargo::rustc-check-cfg=cfg(ptx_embedded)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=../quant/src");
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let modules =
        if std::env::var_os("CARGO_FEATURE_PTX").is_some() { modules(&out_dir) } else { Vec::new() };
    if !modules.is_empty() {
        println!("cargo::rustc-cfg=ptx_embedded");
    }
    let table = table(&out_dir, &modules).unwrap_or_else(|error| panic!("embed PTX: {error}"));
    std::fs::write(out_dir.join("ptx_table.rs"), table).unwrap_or_else(|error| panic!("embed PTX: {error}"));
    let digest = digest().unwrap_or_else(|error| panic!("read the sources: {error}"));
    std::fs::write(out_dir.join("digest.rs"), format!("{digest:#x}"))
        .unwrap_or_else(|error| panic!("write the digest: {error}"));
}

/// FNV-1a over what kernels and launchers are made of, names and texts in order of their paths.
fn digest() -> std::io::Result<u64> {
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            digest = (digest ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    let mut paths = vec![PathBuf::from("../quant/src"), PathBuf::from("src")];
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            let entries = std::fs::read_dir(&path)?.map(|entry| Ok(entry?.path()));
            let mut entries = entries.collect::<std::io::Result<Vec<_>>>()?;
            entries.sort();
            paths.extend(entries);
        } else {
            add(path.to_string_lossy().as_bytes());
            add(&std::fs::read(&path)?);
        }
    }
    Ok(digest)
}

fn modules(out_dir: &Path) -> Vec<Module> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    // OUT_DIR is target/PROFILE/build/NAME/out, with the target's name before PROFILE where one is given.
    let build_dir = out_dir.ancestors().nth(4).unwrap_or(out_dir).join("ptx");
    let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let build = || {
        std::fs::create_dir_all(&build_dir)
            .map_err(|source| PtxError::Io { what: format!("create {}", build_dir.display()), source })?;
        let compiler = Compiler::find(&build_dir)?;
        let kernels = Kernels::prepare(&compiler, &cargo, root, &build_dir)?;
        let embedded: Vec<String> = kernels.names().iter().filter(|name| *name != CHECKS).cloned().collect();
        kernels.build(&embedded, &tiers())
    };
    match build() {
        Ok(modules) => modules,
        Err(error @ PtxError::NoCompiler { .. }) => {
            println!("cargo::warning=built without GPU kernels ({error}); to have them: {INSTALL_COMMAND}");
            // Once something was installed the next build looks again.
            for changes in Compiler::places().iter().filter(|place| place.exists()) {
                println!("cargo::rerun-if-changed={}", changes.display());
            }
            Vec::new()
        }
        Err(error) => panic!("{error}"),
    }
}

/// The tiers to build: all, or for a quicker build those that the developer names.
fn tiers() -> Vec<Tier> {
    println!("cargo::rerun-if-env-changed={TIERS_VARIABLE}");
    match std::env::var(TIERS_VARIABLE) {
        Err(_) => TIERS.to_vec(),
        Ok(names) => {
            let tier = |name: &str| {
                *Tier::named(name).unwrap_or_else(|| panic!("{TIERS_VARIABLE}: no tier {name:?}"))
            };
            names.split(',').map(tier).collect()
        }
    }
}

/// The texts of one entry, of all tiers, packed one after the other.
struct File<'a> {
    packed: Vec<u8>,
    /// Where each declaration and entry is.
    places: HashMap<&'a str, Range<usize>>,
    deflated: Vec<u8>,
}

impl<'a> File<'a> {
    fn new(book: &Book, texts: &BTreeSet<(&'a str, &'a str)>) -> File<'a> {
        let (mut packed, mut places) = (Vec::new(), HashMap::new());
        for (_, text) in texts {
            let start = packed.len();
            book.pack(text, &mut packed);
            places.insert(*text, start..packed.len());
        }
        let deflated = miniz_oxide::deflate::compress_to_vec(&packed, 9);
        File { packed, places, deflated }
    }

    /// Where these texts are; neighbours in one range.
    fn ranges(&self, texts: impl Iterator<Item = &'a str>) -> Vec<(usize, usize)> {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for Range { start, end } in texts.map(|text| self.places[text].clone()) {
            match ranges.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => ranges.push((start, end)),
            }
        }
        ranges
    }
}

/// Source of the table, with the files it includes beside it.
fn table(out_dir: &Path, modules: &[Module]) -> Result<String, PtxError> {
    if modules.is_empty() {
        return Ok("&[]".into());
    }
    let entries: Vec<(&Module, Entry)> = modules
        .iter()
        .flat_map(|module| module.entries().into_iter().map(move |entry| (module, entry)))
        .collect();
    let mut by_name: BTreeMap<&str, BTreeSet<(&str, &str)>> = BTreeMap::new();
    for (_, entry) in &entries {
        // By first line: the tiers of an entry side by side, within what deflate remembers.
        let texts = entry.texts.iter().map(|text| (text.lines().next().unwrap_or_default(), *text));
        by_name.entry(entry.kernel).or_default().extend(texts);
    }
    let texts: BTreeSet<&str> = by_name.values().flatten().map(|&(_, text)| text).collect();
    let book = Book::new(&texts.into_iter().collect::<Vec<_>>());
    let jobs: Vec<_> = by_name.into_iter().collect();
    let files = ptx_build::in_parallel(&jobs, |(name, texts)| {
        let (file, path) = (File::new(&book, texts), out_dir.join(format!("{name}.ptx.deflate")));
        let wrote = std::fs::write(&path, &file.deflated);
        wrote.map_err(|source| PtxError::Io { what: format!("write {}", path.display()), source })?;
        Ok(file)
    })?;
    let files: BTreeMap<&str, &File> = jobs.iter().map(|(name, _)| *name).zip(&files).collect();

    // The files' bytes as constants of their own, and all in a static: so that they are in a program once.
    let (mut consts, mut rows) = (String::new(), String::new());
    // Writing to a string cannot fail.
    let (shapes, literals) = (book.shapes(), book.literals());
    let _ =
        writeln!(consts, "static WORDS: Words = Words {{ shapes: &{shapes:?}, literals: &{literals:?} }};");
    for name in files.keys() {
        let path = format!("concat!(env!(\"OUT_DIR\"), \"/{name}.ptx.deflate\")");
        let _ = writeln!(
            consts,
            "#[allow(non_upper_case_globals)]\nconst FILE_{name}: &[u8] = include_bytes!({path});"
        );
    }
    for (module, Entry { kernel, texts }) in &entries {
        let Tier { name: tier, sm, exact, .. } = module.tier;
        let (file, packed) = (&module.name, files[kernel]);
        let (packed_bytes, ranges) = (packed.packed.len(), packed.ranges(texts.iter().copied()));
        let _ = writeln!(
            rows,
            "PtxModule {{ file: {file:?}, entry: {kernel:?}, tier: {tier:?}, sm: {sm}, exact: {exact}, \
             packed_bytes: {packed_bytes}, ranges: &{ranges:?}, deflated: FILE_{kernel}, words: &WORDS }},",
        );
    }
    Ok(format!("{{\n{consts}&[\n{rows}]\n}}"))
}
