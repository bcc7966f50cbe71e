//! Running programs: with their output on the terminal, captured, or measured.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::TaskError;

/// How often a measured process's memory is read. The kernel keeps the peak itself, so only growth in the last
/// interval before exit can be missed.
const POLL: Duration = Duration::from_millis(5);

/// What a measured run cost.
#[derive(Debug)]
pub struct Measured {
    /// The program's stdout.
    pub stdout: String,
    /// From spawn to exit.
    pub wall: Duration,
    /// Peak resident set; `None` where the system has no `/proc`.
    pub peak_rss_bytes: Option<u64>,
}

/// The command as a user would type it: the program by its name alone.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut words = vec![program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

fn spawn(command: &mut Command) -> Result<Child, TaskError> {
    command.spawn().map_err(TaskError::io(format!("start `{}`", line(command))))
}

fn finished(command: &Command, output: Output) -> Result<String, TaskError> {
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        return Err(TaskError::Command { line: line(command), status: output.status.to_string() });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Run to the end with the terminal's stdout and stderr.
pub fn run(command: &mut Command) -> Result<(), TaskError> {
    let status = spawn(command)?.wait().map_err(TaskError::io(format!("wait for `{}`", line(command))))?;
    if status.success() {
        Ok(())
    } else {
        Err(TaskError::Command { line: line(command), status: status.to_string() })
    }
}

/// Run to the end and return stdout; stderr is shown only if the program fails.
pub fn capture(command: &mut Command) -> Result<String, TaskError> {
    let output = command.output().map_err(TaskError::io(format!("start `{}`", line(command))))?;
    finished(command, output)
}

/// Whether the program can be started and says that all is well. Silent.
pub fn works(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
}

/// Run to the end, with wall time and peak memory.
pub fn measure(command: &mut Command) -> Result<Measured, TaskError> {
    let start = Instant::now();
    let child = spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let status_path = format!("/proc/{}/status", child.id());
    let done = AtomicBool::new(false);
    let (output, wall, peak_rss_bytes) = std::thread::scope(|scope| {
        let poll = scope.spawn(|| {
            let mut peak = None;
            while !done.load(Ordering::Relaxed) {
                peak = std::fs::read_to_string(&status_path).ok().and_then(|text| peak_rss(&text)).or(peak);
                std::thread::sleep(POLL);
            }
            peak
        });
        let output = child.wait_with_output();
        let wall = start.elapsed();
        done.store(true, Ordering::Relaxed);
        (output, wall, poll.join().unwrap_or(None))
    });
    let output = output.map_err(TaskError::io(format!("wait for `{}`", line(command))))?;
    Ok(Measured { stdout: finished(command, output)?, wall, peak_rss_bytes })
}

/// `VmHWM` of a `/proc/PID/status`, in bytes.
fn peak_rss(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_rss_reads_the_kernels_line() {
        let status = "Name:\trunik\nVmPeak:\t  999 kB\nVmHWM:\t  123456 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(peak_rss(status), Some(123_456 * 1024));
        assert_eq!(peak_rss("Name:\tzombie\n"), None);
    }

    #[test]
    fn a_failing_program_is_an_error_with_its_line() {
        let error = run(&mut Command::new("false")).unwrap_err();
        assert!(matches!(error, TaskError::Command { line, .. } if line == "false"));
        assert!(matches!(capture(&mut Command::new("/no/such/program")), Err(TaskError::Io { .. })));
    }

    #[test]
    fn measure_sees_time_and_output() {
        let measured = measure(Command::new("sh").args(["-c", "sleep 0.1; echo done"])).unwrap();
        assert_eq!(measured.stdout, "done\n");
        assert!(measured.wall >= Duration::from_millis(100));
    }
}
