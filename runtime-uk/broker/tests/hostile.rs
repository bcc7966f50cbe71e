//! Both ends of the protocol with a hostile other end: sessions made of true messages, changed a little or a lot, and what
//! the fuzzers found.

#[path = "../../fuzz/harness.rs"]
mod harness;

use std::path::Path;

use proptest::prelude::*;
use uk_wire::command::{Command, Data, Kind, Short};
use uk_wire::frame::{Frame, Hello, NameBytes, Welcome};
use uk_wire::{Reply, SLOT_BYTES};

fn submission(to: u64, commands: &[Command], data: &[u8], reply_bytes: u32) -> Vec<u8> {
    let slots: Vec<u8> = commands.iter().flat_map(|c| c.encode().slots().as_flattened().to_vec()).collect();
    let n = (slots.len() / SLOT_BYTES) as u32;
    let frame = Frame::Submit { to: to + u64::from(n), slots: n, data_bytes: data.len() as u32, reply_bytes };
    [&frame.encode()[..], &slots, data].concat()
}

/// What a guest says that does a little of everything.
fn guest_session() -> Vec<u8> {
    let data = Data { at: 0, bytes: 64 };
    let first = [
        Command::Alloc { kind: Kind::Device, bytes: 4096 },
        Command::CreateStream,
        Command::Kernel { name: Short::new(b"binary_f32").unwrap() },
        Command::Record { stream: 0 },
    ];
    let second = [
        Command::Write { to: 4096, from: data, stream: 0 },
        Command::Read { from: 4096, to: data, stream: 0 },
        Command::BeginCapture { stream: 1 },
        Command::EndCapture { stream: 1 },
        Command::LaunchGraph { graph: 0, stream: 0 },
        Command::ErrorText { to: data },
        Command::Synchronise { stream: 0 },
    ];
    [
        Hello { ring: None }.encode().to_vec(),
        submission(0, &first, &[], 0),
        submission(first.len() as u64, &second, &[7; 64], 64),
    ]
    .concat()
}

/// What a broker says to the guest of the harness.
fn broker_session() -> Vec<u8> {
    let mut bytes =
        Welcome { sm: 80, n_sm: 1, name: NameBytes::new("a device"), ..Welcome::default() }.encode().to_vec();
    // alloc, stream, then write and the kernel's name; read with its data; is_done; free and synchronise.
    let mut to = 0;
    for (slots, data_bytes) in [(1u64, 0u32), (1, 0), (2, 0), (2, 300), (1, 0), (2, 0)] {
        to += slots;
        bytes.extend(Frame::Alive.encode());
        bytes.extend(Frame::Complete { to, slots: slots as u32, data_bytes }.encode());
        (0..slots).for_each(|i| bytes.extend(Reply::done(i + 1).encode()));
        bytes.extend(std::iter::repeat_n(9, data_bytes as usize));
    }
    bytes
}

/// Every cut and every changed byte of true sessions.
#[test]
fn sessions_cut_and_changed() {
    for (session, run) in
        [(guest_session(), harness::broker as fn(&[u8])), (broker_session(), harness::guest)]
    {
        run(&session);
        for at in (0..session.len()).step_by(7) {
            run(&session[..at]);
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = session.clone();
                changed[at] = value;
                run(&changed);
            }
        }
    }
}

/// The fuzzers' finds, if there are any here.
#[test]
fn corpus() {
    for (name, run) in [("broker", harness::broker as fn(&[u8])), ("guest", harness::guest)] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!files.is_empty(), "{} is empty", folder.display());
        files.iter().for_each(|path| run(&std::fs::read(path).unwrap()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn sessions_changed_at_random(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        for (mut session, run) in [(guest_session(), harness::broker as fn(&[u8])), (broker_session(), harness::guest)] {
            for (at, value) in &changes {
                let at = at.index(session.len());
                session[at] = *value;
            }
            run(&session);
        }
    }
}

/// Writes the true sessions as seeds: `UPDATE_GOLDEN=1 cargo test -p uk-broker --test hostile`.
#[test]
fn seeds_are_current() {
    for (name, session) in [("broker", guest_session()), ("guest", broker_session())] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name).join("session");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &session).unwrap();
        }
        assert!(
            std::fs::read(&path).unwrap() == session,
            "{} is old; UPDATE_GOLDEN=1 writes it",
            path.display()
        );
    }
}
