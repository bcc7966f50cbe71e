//! The server with a hostile client: for the fuzz targets, and for the tests that replay what they found.
//!
//! An input is a number of cuts (its first byte, modulo 8), the length of each piece but the last (a byte each), and what
//! the client sends.

use std::sync::{Arc, LazyLock};

use engine::backends::cpu::{Cpu, Isa};
use engine::executor::Serial;
use engine::sampler::SamplerParams;
use engine::weights::ByteSource;
use engine::{Context, ContextParams, Model, Tokenizer};
use server::http::{Incoming, Reader, Request};
use server::scheduler::Scheduler;
use server::{Limits, Message, Server, ServerConfig, Templates};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../cli/tests/golden/llama-linear-a.gguf");
/// The fuzz crate lies one folder deeper than the tests' crate.
const MODEL_FROM_FUZZ: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../../cli/tests/golden/llama-linear-a.gguf");

/// What a client sends, in pieces.
pub fn pieces(input: &[u8]) -> Vec<&[u8]> {
    let Some((&n, rest)) = input.split_first() else { return Vec::new() };
    let (lengths, mut bytes) = rest.split_at(rest.len().min(usize::from(n % 8)));
    let mut pieces = Vec::new();
    for &length in lengths {
        let (piece, rest) = bytes.split_at(bytes.len().min(length.into()));
        pieces.push(piece);
        bytes = rest;
    }
    pieces.push(bytes);
    pieces
}

/// Requests, and the status that ended them if one did. A reader that waits must have room, or it would wait forever.
pub fn read(pieces: &[&[u8]]) -> (Vec<Request>, Option<u16>) {
    let mut reader = Reader::new(256, 64);
    let mut found = Vec::new();
    for piece in pieces {
        reader.push(piece);
        loop {
            match reader.poll() {
                Ok(None) => break,
                // Depends on the cut: a client that has sent part of the body does not wait.
                Ok(Some(Incoming::Continue)) => {}
                Ok(Some(Incoming::Request(request))) => found.push(request),
                Err(error) => return (found, Some(error.status)),
            }
        }
        assert!(reader.has_room(), "it waits with a full buffer");
    }
    (found, None)
}

/// What is read does not depend on where the bytes were cut.
pub fn http(input: &[u8]) {
    let pieces = pieces(input);
    let bytes = pieces.concat();
    let whole = read(&[&bytes]);
    assert_eq!(read(&pieces), whole, "{pieces:?}");
    assert_eq!(read(&bytes.chunks(1).collect::<Vec<_>>()), whole, "byte by byte");
}

struct Plain;

impl Templates for Plain {
    fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
        let text: String = messages.iter().map(|m| format!("{}: {}\n", m.role, m.content)).collect();
        tokenizer.encode(text.as_bytes(), Default::default()).map_err(|e| e.to_string())
    }
}

/// The server's model.
pub static TINY: LazyLock<Arc<Model>> = LazyLock::new(|| {
    let bytes = std::fs::read(MODEL).or_else(|_| std::fs::read(MODEL_FROM_FUZZ)).unwrap();
    let bytes: Arc<dyn ByteSource> = Arc::new(bytes);
    Arc::new(Model::load(vec![bytes]).unwrap())
});

/// The server answers whatever comes, no answer is its own failure, and with the bytes its work ends. What it said.
pub fn serve(input: &[u8]) -> Vec<u8> {
    let context = |embeddings| {
        let backend = Cpu::new(TINY.weights().clone(), Arc::new(Serial), Isa::detect());
        let params =
            ContextParams { n_ctx: 64, n_seq: 2, n_ubatch: 8, embeddings, ..ContextParams::default() };
        Context::new(TINY.clone(), Box::new(backend), params).unwrap()
    };
    let config = ServerConfig {
        model_name: "tiny".into(),
        sampling: SamplerParams::default(),
        seed: Some(1),
        entropy: 1,
        max_tokens: None,
        api_key: None,
        epoch_s: 0,
        limits: Limits { head_bytes: 1024, body_bytes: 1024, output_bytes: 4096, ..Limits::default() },
    };
    let scheduler = Scheduler::new(&TINY, context(false), 2, 8);
    let mut server = Server::new(&TINY, Some(scheduler), Some(context(true)), Box::new(Plain), config);
    let id = server.open(0).unwrap();
    let mut said = Vec::new();
    let work = |server: &mut Server<'_>, said: &mut Vec<u8>, steps: usize| {
        for _ in 0..steps {
            let n = server.output(id).len();
            said.extend_from_slice(server.output(id));
            server.sent(id, n, 0);
            if !server.has_work() && n == 0 {
                return;
            }
            server.step(&|| 0);
        }
    };
    for piece in pieces(input) {
        server.receive(id, piece, 0);
        work(&mut server, &mut said, 3);
    }
    // Each request takes its prompt and its answer, of 64 positions together, or its embeddings.
    work(&mut server, &mut said, 64 * (input.len() + 1));
    assert!(!server.has_work(), "it does not come to rest");
    assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 "), "{}", String::from_utf8_lossy(&said));
    let failed = said.windows(13).any(|text| text == b"HTTP/1.1 500 ");
    assert!(!failed, "{}", String::from_utf8_lossy(&said));
    server.close(id);
    said
}
