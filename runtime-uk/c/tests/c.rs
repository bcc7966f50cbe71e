//! The header is what cbindgen makes of the source, and a C program that uses it links and runs.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use gpu_kernels::emu::{Emulator, Options};
use uk_broker::metrics::Metrics;
use uk_broker::{Limits, serve};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn the_header_is_current() {
    let config = cbindgen::Config::from_root_or_default(ROOT);
    let made = cbindgen::Builder::new()
        .with_src(Path::new(ROOT).join("src/lib.rs"))
        .with_config(config)
        .generate()
        .unwrap();
    let mut text = Vec::new();
    made.write(&mut text);
    let path = Path::new(ROOT).join("include/cuda_uk.h");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert!(std::fs::read(&path).unwrap() == text, "{} is old; UPDATE_GOLDEN=1 writes it", path.display());
}

/// The static library that cargo built beside this test.
fn library() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_string();
    let all = std::fs::read_dir(&deps).unwrap().chain(std::fs::read_dir(deps.parent().unwrap()).unwrap());
    let found = all.map(|entry| entry.unwrap().path()).filter(|path| {
        name(path).starts_with("libuk_c") && path.extension().is_some_and(|extension| extension == "a")
    });
    found.max_by_key(|path| path.metadata().unwrap().modified().unwrap()).expect("cargo built no libuk_c.a")
}

#[test]
fn a_c_program_adds_on_the_emulator() {
    let folder = std::env::temp_dir().join(format!("runik-c-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (program, socket) = (folder.join("add"), folder.join("gpu"));
    let mut compile = Command::new("cc");
    compile.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"]).arg(Path::new(ROOT).join("include"));
    compile.arg(Path::new(ROOT).join("tests/add.c")).arg(library());
    compile.args(["-lpthread", "-ldl", "-lm", "-lgcc_s", "-o"]).arg(&program);
    let output = compile.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listener = UnixListener::bind(&socket).unwrap();
    let broker = std::thread::spawn(move || {
        let (guest, _) = listener.accept().unwrap();
        let driver = Emulator::new(Options::default());
        let reader = guest.try_clone().unwrap();
        serve(reader, guest, &driver, None, Limits::default(), &Metrics::default())
    });
    let output = Command::new(&program).arg(&socket).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
    broker.join().unwrap().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
}
