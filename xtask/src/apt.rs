//! Debian packages, where we may install them.

use std::process::Command;
use std::sync::Once;

use crate::process;

/// The command that a user would type for the same.
pub fn line(packages: &[&str]) -> String {
    format!("apt-get update && apt-get install -y --no-install-recommends {}", packages.join(" "))
}

/// Installs packages in their newest versions if we are root on a Debian; else says what to run.
pub fn install(packages: &[&str]) -> Result<(), String> {
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let root = process::capture(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim() == "0");
    if !root || !process::works(apt().arg("--version")) {
        return Err(format!("not root on a Debian, so run `{}` yourself", line(packages)));
    }
    eprintln!("{}", line(packages));
    let install = |wanted: &[String]| {
        process::works(
            apt().args(["install", "-y", "--no-install-recommends", "--allow-downgrades"]).args(wanted),
        )
    };
    // A fresh machine has no package lists, or its image's: those install what was new when the image was made.
    static UPDATE: Once = Once::new();
    UPDATE.call_once(|| {
        if !process::works(apt().arg("update")) {
            eprintln!("`apt-get update` failed; trying with the package lists that are there");
        }
    });
    let plain: Vec<String> = packages.iter().map(|name| name.to_string()).collect();
    if install(&plain) {
        return Ok(());
    }
    Err(format!("`{}` failed", line(packages)))
}
