//! The finishing touches on a kernel file's PTX, and the rules it must keep.
//!
//! Finishing: the header says which tier it is for; rustc emits no launch bounds, so kernels carry them as a comment
//! `// @launch .maxntid 256,1,1`, which is moved to the entry's header; rustc cannot align a parameter beyond 16 bytes,
//! so `// @param_align INDEX ALIGN` raises it in the text; comments that mark inline assembly go. Registers and labels
//! are numbered anew in the order in which they appear, and parameters lose the entry's name: LLVM's numbers depend on
//! the whole file, and equal code with equal names is small once packed (`ptx-pack`).
//!
//! Rules: no call (of code that was not inlined), no local memory, no variable but constant tables, from sm_90 on a wait
//! for earlier launches in every entry, and each canary kernel (`device/canary.rs`) holds exactly one barrier: LLVM or
//! rustc copying it means that convergence is broken.
//!
//! A driver compiles all that it is given, so it is given one entry at a time: the header, the tables that the entry
//! names, and the entry. Functions that rustc emits beside the entries are left out, since nothing calls them.

use std::collections::HashMap;
use std::fmt::Write as _;

use crate::error::PtxError;
use crate::tier::Tier;

const ENTRY: &str = ".visible .entry ";
/// Kernels whose name starts so are there for the barrier rule alone.
const CANARY: &str = "canary_";
/// Tables whose name starts so are constants of the source, which rustc gives no other name. A `static` keeps its own: it
/// could be written to, and each entry that is loaded would have one of its own.
const CONSTANT: &str = "anon_";

/// PTX of one kernel file for one tier, ready for a driver.
#[derive(Clone, Debug)]
pub struct Module {
    /// The tier.
    pub tier: Tier,
    /// The kernel file's stem.
    pub name: String,
    /// PTX text.
    pub ptx: String,
    /// Names of the entries, sorted.
    pub kernels: Vec<String>,
}

/// What a driver loads at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Its text, in pieces: the declarations it needs, then the entry itself.
    pub texts: Vec<&'a str>,
}

impl Module {
    /// Finishes and checks the compiler's output.
    pub fn finish(tier: Tier, name: &str, raw: &str) -> Result<Module, PtxError> {
        let file = name;
        let lint = |kernel: &str, what: String| PtxError::Lint {
            tier: tier.name.into(),
            kernel: kernel.into(),
            what,
        };
        let raw = without_functions(raw);
        let mut parts = split_at_entries(&raw).into_iter();
        let mut ptx = String::with_capacity(raw.len());
        push_code(&mut ptx, &with_header_of(tier, parts.next().unwrap_or_default()));
        let mut tables = ptx.lines().filter_map(table_name);
        if let Some(table) = tables.find(|table| !table.starts_with(CONSTANT)) {
            return Err(lint(
                "module",
                format!("has a static, {table}, of which each entry would have its own"),
            ));
        }
        let mut kernels = Vec::new();
        for entry in parts {
            let name = entry_name(entry).ok_or_else(|| lint("module", "an entry without a name".into()))?;
            if entry.contains("__local_depot") {
                return Err(lint(name, "uses local memory (an array indexed at run time?)".into()));
            }
            if let Some(line) = entry.lines().find(|line| is_call(line)) {
                return Err(lint(name, format!("calls a function that was not inlined: {}", line.trim())));
            }
            let barriers = entry.lines().filter(|line| is_barrier(line)).count();
            // What a kernel does before is its own affair, but without it a step's later launches would not know when
            // its earlier ones have ended.
            if tier.sm >= 90 && !entry.contains("griddepcontrol.wait") {
                return Err(lint(name, "does not wait for earlier launches".into()));
            }
            if name.starts_with(CANARY) && barriers != 1 {
                return Err(lint(
                    name,
                    format!("{barriers} barriers where the source has one: convergence is broken"),
                ));
            }
            let hoisted = hoist(entry, name).ok_or_else(|| lint(name, "malformed @ comment".into()))?;
            let start = ptx.len();
            push_code(&mut ptx, &hoisted);
            let renamed = rename(&ptx[start..], name);
            ptx.truncate(start);
            ptx.push_str(&renamed);
            kernels.push(name.to_string());
        }
        kernels.sort();
        Ok(Module { tier, name: file.into(), ptx, kernels })
    }

    /// What a driver loads, entry by entry.
    pub fn entries(&self) -> Vec<Entry<'_>> {
        let mut pieces = split_at_entries(&self.ptx).into_iter();
        // One line per declaration, as LLVM prints them; those that name no table belong to every entry.
        let declarations: Vec<&str> = pieces.next().unwrap_or_default().split_inclusive('\n').collect();
        let entry = |text| {
            let used = |line: &&str| table_name(line).is_none_or(|table| names(text, table));
            let texts = declarations.iter().copied().filter(used).chain([text]).collect();
            Some(Entry { kernel: entry_name(text)?, texts })
        };
        pieces.filter_map(entry).collect()
    }
}

fn is_barrier(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("bar.sync") || line.starts_with("barrier.sync") || line.starts_with("barrier.cta.sync")
}

fn is_call(line: &str) -> bool {
    line.split_whitespace().any(|word| word == "call" || word.starts_with("call."))
}

/// Whether a text has this name, and not as the start of a longer one.
fn names(text: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| !text[at + name.len()..].starts_with(is_word))
}

/// The text without functions and their declarations.
fn without_functions(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut in_function = false;
    for line in text.lines() {
        in_function |= line.starts_with('.') && line.contains(".func ");
        if !in_function {
            kept.push_str(line);
            kept.push('\n');
        }
        // As LLVM ends a body and a declaration.
        in_function &= !matches!(line, "}" | ";");
    }
    kept
}

/// The text before the first entry, then one part per entry.
fn split_at_entries(text: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = text.match_indices(ENTRY).map(|(at, _)| at).collect();
    starts.insert(0, 0);
    starts.push(text.len());
    starts.windows(2).map(|range| &text[range[0]..range[1]]).collect()
}

fn entry_name(entry: &str) -> Option<&str> {
    entry.strip_prefix(ENTRY)?.split(['(', '\n']).next().map(str::trim).filter(|name| !name.is_empty())
}

/// The name of the table that a line declares.
fn table_name(line: &str) -> Option<&str> {
    let is_table = line.starts_with('.') && [".global ", ".const "].iter().any(|space| line.contains(space));
    is_table.then(|| line.split(['[', ';', '=']).next()?.split_whitespace().last())?
}

/// Moves what the `@` comments say to where PTX wants it.
fn hoist(entry: &str, name: &str) -> Option<String> {
    let mut text = entry.to_string();
    for line in entry.lines() {
        let Some(note) = line.trim_start().strip_prefix("// @") else { continue };
        let (kind, rest) = note.split_once(' ')?;
        match kind {
            "launch" => text = text.replacen("\n)\n{", &format!("\n)\n{}\n{{", rest.trim()), 1),
            "param_align" => {
                let (index, align) = rest.trim().split_once(' ')?;
                let param = format!(".b8 {name}_param_{index}[");
                text = text.replacen(&format!(".align 16 {param}"), &format!(".align {align} {param}"), 1);
            }
            _ => return None,
        }
    }
    Some(text)
}

/// Kinds of names that are numbered anew, as LLVM writes them and as they are written instead. A register keeps its kind,
/// so its declaration (`.reg .b32 %r<40>`) still covers it.
const NUMBERED: [(&str, &str); 5] =
    [("$L__BB", "$L"), ("%p", "%p"), ("%rs", "%rs"), ("%r", "%r"), ("%rd", "%rd")];

/// The entry with registers and labels numbered from 0 in order of appearance, and `param_0` for `NAME_param_0`.
fn rename(entry: &str, name: &str) -> String {
    let entry = entry.replace(&format!("{name}_param_"), "param_");
    let mut text = String::with_capacity(entry.len());
    let (mut names, mut counts): (HashMap<&str, usize>, _) = (HashMap::new(), [0; NUMBERED.len()]);
    let mut rest = entry.as_str();
    while let Some(at) = rest.find(['%', '$']) {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let end = rest[at + 1..].find(|c| !is_word(c)).map_or(rest.len(), |len| at + 1 + len);
        let word = &rest[at..end];
        text.push_str(&rest[..at]);
        rest = &rest[end..];
        // `%r12`, `$L__BB7_12`.
        let is_number = |digits: &str| digits.starts_with(|c: char| c.is_ascii_digit());
        let kind = NUMBERED.iter().position(|(kind, _)| word.strip_prefix(kind).is_some_and(is_number));
        match kind {
            Some(kind) => {
                let number = *names.entry(word).or_insert_with(|| {
                    counts[kind] += 1;
                    counts[kind] - 1
                });
                // Writing to a string cannot fail.
                let _ = write!(text, "{}{number}", NUMBERED[kind].1);
            }
            None => text.push_str(word),
        }
    }
    text.push_str(rest);
    text
}

/// Declarations with the PTX version and the target of a tier, which may have the code of another one.
fn with_header_of(tier: Tier, declarations: &str) -> String {
    let (major, minor) = tier.ptx["ptx".len()..].split_at(1);
    let line = |line: &str| match line.split_whitespace().next() {
        Some(".version") => format!(".version {major}.{minor}\n"),
        Some(".target") => format!(".target {}\n", tier.name),
        _ => format!("{line}\n"),
    };
    declarations.lines().map(line).collect()
}

/// Appends lines that are code.
fn push_code(out: &mut String, text: &str) {
    for line in text.lines() {
        let code = line.trim();
        if !code.is_empty() && !code.starts_with("//") {
            out.push_str(line.split_once("// ").map_or(line, |(code, _)| code).trim_end());
            out.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::TIERS;

    fn entry(name: &str, body: &str) -> String {
        format!("{ENTRY}{name}(\n\t.param .align 16 .b8 {name}_param_0[128]\n)\n{{\n{body}\n\tret;\n}}\n")
    }

    fn finish(text: &str) -> Result<Module, PtxError> {
        Module::finish(TIERS[0], "k", &format!("// made by LLVM\n.version 6.3\n{text}"))
    }

    #[test]
    fn the_header_is_the_tier_s_own() {
        let tier = *Tier::named("sm_89").unwrap();
        let module =
            Module::finish(tier, "k", &format!(".version 7.4\n.target sm_80\n{}", entry("k", ""))).unwrap();
        assert!(module.ptx.starts_with(".version 8.4\n.target sm_89\n"), "{}", module.ptx);
    }

    #[test]
    fn comments_become_directives() {
        let body = "\t// begin inline asm\n\t// @launch .maxntid 64,1,1\n\t// end inline asm\n\t// @param_align 0 64";
        let module = finish(&entry("k", body)).unwrap();
        assert!(module.ptx.starts_with(".version 6.3\n"));
        assert!(module.ptx.contains(")\n.maxntid 64,1,1\n{"));
        assert!(module.ptx.contains(".align 64 .b8 param_0[128]"));
        assert!(!module.ptx.contains("//"));
        assert_eq!(module.kernels, ["k"]);
    }

    #[test]
    fn names_are_numbered_in_order_of_appearance() {
        let body = "\t.reg .pred \t%p<3>;\n\t.reg .b32 \t%r<9>;\n\tld.param.b32 \t%r7, [k_1_param_0+4];\n\
            $L__BB3_2:\n\t@%p2 bra \t$L__BB3_12;\n\tmov.b64 \t{_, %r3}, %rd7;\n\tadd.s32 \t%r7, %r3, %tid.x;\n\
            \tbra \t$L__BB3_2;\n$L__BB3_12:\n\tmov.b32 \t%r3, anon_$_1_$_0;";
        let renamed = "\t.reg .pred \t%p<3>;\n\t.reg .b32 \t%r<9>;\n\tld.param.b32 \t%r0, [param_0+4];\n\
            $L0:\n\t@%p0 bra \t$L1;\n\tmov.b64 \t{_, %r1}, %rd0;\n\tadd.s32 \t%r0, %r1, %tid.x;\n\
            \tbra \t$L0;\n$L1:\n\tmov.b32 \t%r1, anon_$_1_$_0;";
        let module = finish(&entry("k_1", body)).unwrap();
        assert!(module.ptx.contains(renamed), "{}", module.ptx);
        assert!(module.ptx.contains(".entry k_1(\n\t.param .align 16 .b8 param_0[128]"));
    }

    #[test]
    fn every_rule_can_fail() {
        let broken = [
            (entry("k", "\t{ // callseq 0, 0\n\tcall.uni (retval0), fmaf, (param0);\n\t}"), "not inlined"),
            (".global .align 4 .u32 _RNvC_5COUNT;\n".to_string() + &entry("k", ""), "_RNvC_5COUNT"),
            (entry("k", "\t.local .align 4 .b8 __local_depot0[64];"), "local memory"),
            (entry("canary_branch", "\tbarrier.sync 0;\n\tbarrier.sync 0;"), "2 barriers"),
            (entry("k", "\t// @unknown 1"), "malformed"),
        ];
        for (text, what) in broken {
            assert!(finish(&text).unwrap_err().to_string().contains(what), "{what}");
        }
        let last = TIERS[TIERS.len() - 1];
        let on_last = |body| Module::finish(last, "k", &format!(".version 8.0\n{}", entry("k", body)));
        on_last("\tgriddepcontrol.wait;").unwrap();
        assert!(on_last("").unwrap_err().to_string().contains("does not wait"));
        finish(&entry("canary_branch", "\tbar.sync 0;")).unwrap();
    }

    #[test]
    fn functions_are_left_out() {
        let declared = ".extern .func (.param .b32 r) fmaf\n(\n\t.param .b32 fmaf_param_0\n)\n;\n";
        let defined = ".visible .func  (.param .b64 r) bytes(\n\t.param .b64 bytes_param_0\n)\n{\n\t{\n\tret;\n\t}\n}\n";
        let table = ".global .align 4 .b8 anon_1[8];\n";
        let [first, second] = ["a", "b"].map(|name| entry(name, "\tld.global.b32 r, [anon_1];"));
        let whole = |functions: [&str; 2]| {
            let [before, between] = functions;
            finish(&format!("{before}{table}{before}{first}{between}{second}")).unwrap().ptx
        };
        assert_eq!(whole([&format!("{declared}{defined}"), defined]), whole(["", ""]));
    }

    #[test]
    fn entries_are_loaded_apart_with_the_tables_they_name() {
        let names = ["k_plain", "k_f16", "k_n2"];
        let bodies = ["", "\tld.global.b32 r, [anon_1];", "\tld.global.b32 r, [anon_12+4];"];
        let texts: String = names.iter().zip(bodies).map(|(name, body)| entry(name, body)).collect();
        let tables = ".global .align 4 .b8 anon_1[8] = {1, 2};\n.global .align 4 .b8 anon_12[8];\n";
        let module = finish(&format!(".extern .shared .b8 smem[];\n{tables}{texts}")).unwrap();
        let entries = module.entries();
        assert_eq!(entries.iter().map(|entry| entry.kernel).collect::<Vec<_>>(), names);
        for (entry, tables) in entries.iter().zip([[false, false], [true, false], [false, true]]) {
            let text = entry.texts.concat();
            assert!(text.starts_with(".version") && text.contains("smem[]"));
            assert_eq!([text.contains("anon_1["), text.contains("anon_12[")], tables, "{text}");
            assert_eq!(text.matches(ENTRY).count(), 1);
        }
    }
}
