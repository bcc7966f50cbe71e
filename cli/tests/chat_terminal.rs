//! The chat as a person meets it: a prompt on a pseudo-terminal, answers, Ctrl-C, Ctrl-D.
//!
//! Needs a model that speaks (`RUNIK_TEST_MODEL`); without one this says so and passes.
#![cfg(unix)]

mod common;

use std::process::Command;

use rexpect::session::{PtySession, spawn_command};

/// Longest wait for an answer on a slow, busy machine.
const PATIENCE_MS: u64 = 120_000;

/// A chat at its first prompt; `None` without a model.
fn chat(more: &[&str]) -> Option<PtySession> {
    let Ok(model) = std::env::var("RUNIK_TEST_MODEL") else {
        println!("skipped: RUNIK_TEST_MODEL is not set");
        return None;
    };
    let mut command: Command = common::runik();
    command.args(["run", &model, "--temp", "0"]).args(more);
    command.env("RUNIK_NOHISTORY", "1").env("TERM", "xterm");
    // The terminal is the input, not the null device of other tests.
    command.stdin(std::process::Stdio::inherit());
    let mut session = spawn_command(command, Some(PATIENCE_MS)).unwrap();
    session.exp_string("for help").unwrap();
    session.exp_string(">>> ").unwrap();
    Some(session)
}

/// The process must have exited with this code. (The type of its status has no public name.)
fn assert_exit(session: &PtySession, code: i32) {
    let status = format!("{:?}", session.process().wait().unwrap());
    assert!(status.starts_with("Exited(") && status.ends_with(&format!(", {code})")), "ended as {status}");
}

#[test]
fn a_chat_remembers_its_turns_and_ends_with_bye() {
    let Some(mut chat) = chat(&["-n", "24"]) else { return };
    chat.send_line("My name is Ada. Say hello to me.").unwrap();
    chat.exp_string(">>> ").unwrap();
    chat.send_line("/show").unwrap();
    // Two messages so far: the question and the answer.
    chat.exp_regex("2 messages, [0-9]+ of [0-9]+ tokens").unwrap();
    chat.exp_string(">>> ").unwrap();
    chat.send_line("/nonsense").unwrap();
    chat.exp_string("unknown command /nonsense").unwrap();
    chat.exp_string(">>> ").unwrap();
    chat.send_line("/bye").unwrap();
    chat.exp_eof().unwrap();
    assert_exit(&chat, 0);
}

#[test]
fn ctrl_c_stops_the_answer_and_keeps_the_chat() {
    // No end but Ctrl-C: the end-of-answer token is ignored, and the context is roomy.
    let Some(mut chat) = chat(&["-n", "4000", "-c", "8192", "--ignore-eos"]) else { return };
    chat.send_line("Count to one million.").unwrap();
    // The echo of the line, then the first words of the answer.
    chat.exp_string("million.").unwrap();
    chat.exp_regex("[A-Za-z0-9]+").unwrap();
    chat.send_control('c').unwrap();
    chat.exp_string("[stopped]").unwrap();
    chat.exp_string(">>> ").unwrap();
    // At the prompt the same key leaves, as in a shell.
    chat.send_control('c').unwrap();
    chat.exp_eof().unwrap();
    assert_exit(&chat, 130);
}

#[test]
fn ctrl_d_at_the_prompt_ends_the_chat() {
    let Some(mut chat) = chat(&[]) else { return };
    chat.send_control('d').unwrap();
    chat.exp_eof().unwrap();
    assert_exit(&chat, 0);
}
