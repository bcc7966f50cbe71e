//! `cargo xtask demo`: fetch the model, build runik, answer a prompt with streamed text and a timing summary.

use crate::error::TaskError;
use crate::fetch;
use crate::process;
use crate::workspace::Workspace;

const PROMPT: &str = "What is gravity? Explain it in two sentences.";
/// Enough for an answer, little enough for a slow machine.
const N_PREDICT: &str = "64";

/// Answers the prompt given as arguments, else [`PROMPT`].
pub fn run(workspace: &Workspace, args: &[String]) -> Result<(), TaskError> {
    let prompt = if args.is_empty() { PROMPT.to_string() } else { args.join(" ") };
    let model = fetch::smollm2()?;
    eprintln!("building runik and asking: {prompt}");
    let mut command = workspace.cargo();
    command.args(["run", "--quiet", "--release", "-p", "cli", "--bin", "runik", "--", "--verbose", "run"]);
    command.arg(&model).arg(&prompt).args(["-n", N_PREDICT]);
    process::run(&mut command)
}
