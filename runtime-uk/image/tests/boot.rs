//! The image on QEMU: every machine, every way to bring a model, and every way to fail.

mod common;

use std::path::Path;

use common::{DONE, FAILED, FAULT, Guest, PANIC, Scratch, hosted, setup};

const PROMPT: &str = "The quick brown fox";
const N_PREDICT: usize = 12;
const WORDS: &str = "prompt=\"The quick brown fox\" predict=12 ctx=128 exit";

fn expect_tokens(guest: &Guest, image: &Path, model: &Path) {
    let mut running = guest.boot(image);
    assert_eq!(running.end(), DONE, "{}", running.text());
    assert_eq!(running.tokens(), hosted(model, PROMPT, N_PREDICT, 128), "{}", running.text());
}

/// Greedy tokens are the hosted engine's on each machine, with one core and two, with AVX2 and without.
#[test]
fn machines_compute_what_the_host_does() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    for (machine, cores, cpu) in [
        ("q35", 2, "max"),
        ("pc", 1, "max"),
        ("microvm", 2, "max"),
        ("q35", 1, "qemu64"),
        ("microvm,acpi=off", 1, "max"),
    ] {
        let mut guest = Guest::new(machine, WORDS).module(&model);
        (guest.cores, guest.cpu) = (cores, cpu);
        let mut running = guest.boot(&setup.image);
        assert_eq!(running.end(), DONE, "{machine}:\n{}", running.text());
        assert_eq!(
            running.tokens(),
            hosted(&model, PROMPT, N_PREDICT, 128),
            "{machine}:\n{}",
            running.text()
        );
        let isa = if cpu == "max" { "avx2" } else { "scalar" };
        let line = format!("on {isa} with {cores} core(s)");
        assert!(running.text().contains(&line), "{machine}: no {line:?}:\n{}", running.text());
    }
}

/// Architectures of every kind, weights of many formats.
#[test]
fn models_compute_what_the_host_does() {
    let Some(setup) = setup() else { return };
    for name in ["qwen3moe-b", "gemma3-b", "phi3-a", "gpt-oss-b", "quantmix-a"] {
        let model = setup.tiny.join(format!("{name}.gguf"));
        let guest = Guest::new("microvm", WORDS).module(&model);
        expect_tokens(&guest, &setup.image, &model);
    }
}

/// A mapped file (virtio-pmem) and a disk, over PCI and over memory. Both end on a whole page or block, so the file does.
#[test]
fn models_come_by_pmem_and_disk() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let padded = Scratch::new("padded.gguf");
    let mut bytes = std::fs::read(&model).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    std::fs::write(&padded.0, &bytes).unwrap();
    let path = padded.0.to_str().unwrap();

    let mut pmem = Guest::new("q35", &format!("{WORDS} model=pmem"));
    let memory =
        format!("memory-backend-file,id=pm,mem-path={path},size={},share=on,readonly=on", bytes.len());
    pmem = pmem.arg(&["-object", &memory, "-device", "virtio-pmem-pci,memdev=pm"]);
    // The device's memory lies above the guest's.
    pmem = pmem.arg(&["-m", "256M,slots=1,maxmem=1G"]);
    expect_tokens(&pmem, &setup.image, &model);

    for machine in ["pc", "microvm"] {
        let disk = Guest::new(machine, &format!("{WORDS} model=disk"));
        let device = format!("{},drive=d", disk.device("virtio-blk"));
        let drive = format!("if=none,id=d,file={path},format=raw,readonly=on");
        expect_tokens(&disk.arg(&["-drive", &drive, "-device", &device]), &setup.image, &model);
    }
}

/// What cannot be done is said in one line, and the machine ends.
#[test]
fn failures_are_said() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let cut = Scratch::new("cut.gguf");
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&cut.0, &bytes[..bytes.len() / 2]).unwrap();
    let noise = Scratch::new("noise.gguf");
    std::fs::write(&noise.0, [0x5a; 5000]).unwrap();
    let none = Guest::new("microvm", WORDS);
    // A KV cache of 24 MiB.
    let mut crowded = Guest::new("microvm", "parallel=256 ctx=512").module(&model);
    crowded.memory_mib = 24;
    for (guest, expected) in [
        (none, "error: no model (model=auto)"),
        (
            Guest::new("microvm", &format!("{WORDS} model=disk")).module(&model),
            "error: no model (model=disk)",
        ),
        (Guest::new("microvm", WORDS).module(&cut.0), "error: the model: "),
        (Guest::new("microvm", WORDS).module(&noise.0), "error: the model: "),
        (Guest::new("microvm", "threads=many").module(&model), "error: command line: threads=\"many\""),
        (Guest::new("microvm", &format!("{WORDS} device=gpu")).module(&model), "error: no GPU driver: "),
        (crowded, "error: cannot allocate "),
    ] {
        let mut running = guest.boot(&setup.image);
        assert_eq!(running.end(), FAILED, "{expected}:\n{}", running.text());
        assert!(running.text().contains(expected), "no {expected:?}:\n{}", running.text());
    }
}

/// Faults are reported with what happened and where; nothing that is code can be written, nothing else can run.
#[test]
fn faults_are_reported() {
    let Some(setup) = setup() else { return };
    for (name, status, expected) in [
        ("panic", PANIC, "as asked for"),
        ("null", FAULT, "page fault (vector 14, error 0x0)"),
        ("write-text", FAULT, "page fault (vector 14, error 0x3)"),
        ("run-data", FAULT, "page fault (vector 14, error 0x11)"),
        ("stack", FAULT, "page fault"),
        ("worker-stack", FAULT, "page fault"),
        ("memory", PANIC, "memory allocation"),
    ] {
        let mut guest = Guest::new("microvm", &format!("selftest={name}"));
        guest.cores = 2;
        let mut running = guest.boot(&setup.image);
        assert_eq!(running.end(), status, "{name}:\n{}", running.text());
        assert!(running.text().contains(expected), "{name}: no {expected:?}:\n{}", running.text());
    }
}

/// Less than 32 MiB beside the model and its cache: a machine with 36 MiB, firmware included, answers.
#[test]
fn memory_is_small() {
    let Some(setup) = setup() else { return };
    let model = setup.tiny.join("llama-b.gguf");
    let mut guest = Guest::new("microvm", WORDS).module(&model);
    guest.memory_mib = 36;
    expect_tokens(&guest, &setup.image, &model);
}

/// GRUB loads the same file by multiboot2, from a CD, with the model as its module.
#[test]
fn grub_boots_it() {
    let Some(setup) = setup() else { return };
    let made = std::process::Command::new("grub-mkrescue").arg("--version").output();
    if !made.is_ok_and(|out| out.status.success()) || !Path::new("/usr/lib/grub/i386-pc").is_dir() {
        println!(
            "skipped: no grub-mkrescue (Debian: apt-get install grub-pc-bin grub-common xorriso mtools)"
        );
        return;
    }
    let model = setup.tiny.join("llama-b.gguf");
    let root = Scratch::new("iso-root");
    let boot = root.0.join("boot/grub");
    std::fs::create_dir_all(&boot).unwrap();
    std::fs::copy(&setup.image, root.0.join("boot/runik")).unwrap();
    std::fs::copy(&model, root.0.join("boot/model.gguf")).unwrap();
    let menu = format!("multiboot2 /boot/runik {WORDS}\nmodule2 /boot/model.gguf\nboot\n");
    std::fs::write(boot.join("grub.cfg"), menu).unwrap();
    let iso = Scratch::new("runik.iso");
    let output =
        std::process::Command::new("grub-mkrescue").arg("-o").arg(&iso.0).arg(&root.0).output().unwrap();
    std::fs::remove_dir_all(&root.0).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let guest = Guest::new("q35", "");
    let mut running = guest.start(&["-cdrom".into(), iso.0.to_str().unwrap().into()]);
    assert_eq!(running.end(), DONE, "{}", running.text());
    assert_eq!(running.tokens(), hosted(&model, PROMPT, N_PREDICT, 128), "{}", running.text());
}
