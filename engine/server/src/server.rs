//! The server: connections, routes, and the step that computes for all of them.
//!
//! Time is a number of milliseconds that the host passes in; it must not run backwards. A connection has one request
//! under way; what a client sends ahead waits in the reader. Nothing blocks: [`Server::step`] runs at most one batch
//! and one embedding.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use engine::hparams::Pooling;
use engine::sampler::{Rng, SamplerParams};
use engine::tokenizer::{DecodeOptions, EncodeOptions};
use engine::{Context, Model, Tokenizer};
use serde_json::{Value, json};

use crate::api::{self, Fields, Generation, Prompt, VectorEncoding};
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::http::{self, Framed, Incoming, Reader, Request};
use crate::metrics::{Gauges, Metrics};
use crate::output::Output;
use crate::reply::{self, Completion, Whole};
use crate::scheduler::{Event, Job, JobId, Scheduler};

pub use crate::api::Message;

/// Names a connection; never used twice.
pub type ConnectionId = u64;

/// Makes prompts of conversations. It is the host's, since the engine of the models' own templates needs std.
pub trait Templates {
    /// The tokens of a conversation, with what opens an answer. An error is the client's: 400 with this message.
    fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>, String>;
}

/// What a request asks for, and how far its answer has come.
enum Kind {
    Completion {
        job: JobId,
        stream: bool,
        completion: Box<Completion>,
    },
    Embeddings {
        inputs: VecDeque<Vec<u32>>,
        vectors: Vec<Vec<f32>>,
        encoding: VectorEncoding,
        n_tokens: usize,
    },
}

/// A request whose answer takes steps.
struct Exchange {
    framed: Framed,
    began_ms: u64,
    has_token: bool,
    kind: Kind,
}

struct Connection {
    reader: Reader,
    out: Output,
    exchange: Option<Exchange>,
    /// Close once `out` is sent; nothing more is read.
    closing: bool,
    /// When the request in the reader began to arrive, or, without one, when the connection fell silent.
    waiting_since_ms: u64,
    /// When output was last sent, or put into an empty buffer.
    wrote_ms: u64,
}

/// The server of one model.
pub struct Server<'m> {
    config: ServerConfig,
    model: &'m Model,
    templates: Box<dyn Templates + 'm>,
    scheduler: Option<Scheduler<'m>>,
    embedder: Option<Context>,
    connections: BTreeMap<ConnectionId, Connection>,
    next_connection: ConnectionId,
    next_request: u64,
    jobs: BTreeMap<JobId, ConnectionId>,
    /// Connections whose embeddings are not done, in order.
    embeddings: VecDeque<ConnectionId>,
    events: Vec<Event>,
    seeds: Rng,
    metrics: Metrics,
    draining: bool,
}

impl<'m> Server<'m> {
    /// A server that generates with `scheduler` and embeds with `embedder`, a context made for embeddings; what is
    /// missing is answered with 501.
    pub fn new(
        model: &'m Model,
        scheduler: Option<Scheduler<'m>>,
        embedder: Option<Context>,
        templates: Box<dyn Templates + 'm>,
        config: ServerConfig,
    ) -> Server<'m> {
        Server {
            seeds: Rng::new(config.entropy),
            config,
            model,
            templates,
            scheduler,
            embedder,
            connections: BTreeMap::new(),
            next_connection: 0,
            next_request: 0,
            jobs: BTreeMap::new(),
            embeddings: VecDeque::new(),
            events: Vec::new(),
            metrics: Metrics::default(),
            draining: false,
        }
    }

    /// A client has connected. `None`: there are too many, hang up.
    pub fn open(&mut self, now_ms: u64) -> Option<ConnectionId> {
        if self.connections.len() >= self.config.limits.connections {
            return None;
        }
        let id = self.next_connection;
        self.next_connection += 1;
        let limits = &self.config.limits;
        self.connections.insert(
            id,
            Connection {
                reader: Reader::new(limits.head_bytes, limits.body_bytes),
                out: Output::default(),
                exchange: None,
                closing: false,
                waiting_since_ms: now_ms,
                wrote_ms: now_ms,
            },
        );
        Some(id)
    }

    /// Whether the connection may be read from.
    pub fn wants_bytes(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_some_and(|c| !c.closing && c.reader.has_room())
    }

    /// Bytes have come.
    pub fn receive(&mut self, id: ConnectionId, bytes: &[u8], now_ms: u64) {
        let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.closing) else { return };
        if !connection.reader.is_inside() {
            connection.waiting_since_ms = now_ms;
        }
        connection.reader.push(bytes);
        self.advance(id, now_ms);
    }

    /// Bytes to send.
    pub fn output(&self, id: ConnectionId) -> &[u8] {
        self.connections.get(&id).map_or(&[], |c| c.out.rest())
    }

    /// So many bytes of the output are sent.
    pub fn sent(&mut self, id: ConnectionId, n: usize, now_ms: u64) {
        if let Some(connection) = self.connections.get_mut(&id).filter(|_| n > 0) {
            connection.out.sent(n);
            connection.wrote_ms = now_ms;
            self.advance(id, now_ms);
        }
    }

    /// Whether the host should hang up: all is said, or the client was cut off. Then call [`Server::close`].
    pub fn is_done(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_none_or(|c| c.closing && c.out.is_empty())
    }

    /// The client has closed its side, so it waits for nothing: its work stops. What is said already may still be sent.
    pub fn end_of_input(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.closing = true;
        if let Some(exchange) = connection.exchange.take() {
            self.abandon(id, exchange);
        }
    }

    /// The connection is gone, whoever ended it. Its work stops at once.
    pub fn close(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.remove(&id) else { return };
        if let Some(exchange) = connection.exchange {
            self.abandon(id, exchange);
        }
    }

    /// No new requests: those under way end, others are answered with 503.
    pub fn drain(&mut self) {
        self.draining = true;
        for c in self.connections.values_mut() {
            match &mut c.exchange {
                Some(exchange) => exchange.framed.keep_alive = false,
                None => c.closing |= !c.reader.is_inside(),
            }
        }
    }

    /// Whether [`Server::step`] has something to compute.
    pub fn has_work(&self) -> bool {
        self.scheduler.as_ref().is_some_and(Scheduler::has_work) || !self.embeddings.is_empty()
    }

    /// Computes one batch. `clock` is asked before and after.
    pub fn step(&mut self, clock: &dyn Fn() -> u64) {
        let before = clock();
        let mut events = core::mem::take(&mut self.events);
        if let Some(scheduler) = self.scheduler.as_mut().filter(|s| s.has_work()) {
            let count = scheduler.step(&mut events);
            self.metrics.steps += 1;
            self.metrics.prompt_tokens += count.prefill as u64;
            self.metrics.predicted_tokens += count.predicted as u64;
        }
        self.embed_one(clock);
        let now = clock();
        self.metrics.step_ms += now.saturating_sub(before);
        for event in events.drain(..) {
            self.deliver(event, now);
        }
        self.events = events;
    }

    /// Looks at the clock: cuts off those that take too long, keeps silent streams alive.
    pub fn tick(&mut self, now_ms: u64) {
        let limits = self.config.limits.clone();
        let mut cut = Vec::new();
        let mut late = Vec::new();
        for (&id, c) in &mut self.connections {
            let since = |then: u64| now_ms.saturating_sub(then);
            if !c.out.is_empty() {
                if since(c.wrote_ms) > limits.write_ms {
                    cut.push(id);
                }
            } else if let Some(exchange) = &c.exchange {
                if let Kind::Completion { stream: true, .. } = exchange.kind
                    && since(c.wrote_ms) > limits.ping_ms
                {
                    http::stream(c.out.end(), b": ping\n\n", exchange.framed);
                    c.wrote_ms = now_ms;
                }
            } else if c.reader.is_inside() {
                if since(c.waiting_since_ms) > limits.request_ms {
                    late.push(id);
                }
            } else if since(c.waiting_since_ms) > limits.idle_ms {
                cut.push(id);
            }
        }
        for id in late {
            let what = format!("the request did not arrive within {} s", limits.request_ms / 1000);
            self.refuse(id, &ApiError::new(408, what), LAST, now_ms);
        }
        for id in cut {
            self.cut_off(id);
        }
    }

    /// Drops what a connection waits for; [`Server::is_done`] is true afterwards.
    fn cut_off(&mut self, id: ConnectionId) {
        let Some(c) = self.connections.get_mut(&id) else { return };
        c.closing = true;
        c.out = Output::default();
        if let Some(exchange) = c.exchange.take() {
            self.abandon(id, exchange);
        }
    }

    fn abandon(&mut self, id: ConnectionId, exchange: Exchange) {
        self.metrics.cancelled += 1;
        match exchange.kind {
            Kind::Completion { job, .. } => {
                self.jobs.remove(&job);
                if let Some(scheduler) = &mut self.scheduler {
                    scheduler.cancel(job);
                }
            }
            Kind::Embeddings { .. } => self.embeddings.retain(|&c| c != id),
        }
    }

    /// Answers the requests in the reader, up to one whose answer takes steps.
    fn advance(&mut self, id: ConnectionId, now_ms: u64) {
        let max = self.config.limits.output_bytes;
        // A client that asks ahead and does not read waits, too.
        let is_ready = |c: &&mut Connection| !c.closing && c.exchange.is_none() && c.out.len() <= max;
        while let Some(c) = self.connections.get_mut(&id).filter(is_ready) {
            match c.reader.poll() {
                Ok(None) => return,
                Ok(Some(Incoming::Continue)) => {
                    self.write(id, now_ms, |out| out.extend_from_slice(http::CONTINUE))
                }
                Ok(Some(Incoming::Request(request))) => {
                    c.waiting_since_ms = now_ms;
                    self.metrics.requests += 1;
                    let framed = Framed {
                        keep_alive: request.keep_alive && !self.draining,
                        chunks: request.http11,
                        head_only: request.method == "HEAD",
                    };
                    if let Err(error) = self.route(id, &request, framed, now_ms) {
                        self.refuse(id, &error, framed, now_ms);
                    }
                }
                Err(error) => self.refuse(id, &error, LAST, now_ms),
            }
        }
    }

    fn write(&mut self, id: ConnectionId, now_ms: u64, write: impl FnOnce(&mut Vec<u8>)) {
        let Some(c) = self.connections.get_mut(&id) else { return };
        if c.out.is_empty() {
            c.wrote_ms = now_ms;
        }
        write(c.out.end());
    }

    fn respond(
        &mut self,
        id: ConnectionId,
        status: u16,
        kind: &str,
        headers: &str,
        body: &[u8],
        framed: Framed,
        now_ms: u64,
    ) {
        self.write(id, now_ms, |out| http::respond(out, status, kind, headers, body, framed));
        self.finished(id, framed, now_ms);
    }

    fn respond_json(&mut self, id: ConnectionId, value: &Value, framed: Framed, now_ms: u64) {
        self.respond(id, 200, JSON, "", value.to_string().as_bytes(), framed, now_ms);
    }

    fn refuse(&mut self, id: ConnectionId, error: &ApiError, framed: Framed, now_ms: u64) {
        self.metrics.errors += 1;
        let allow = error.allow.map(|methods| format!("Allow: {methods}\r\n"));
        let extra = match error.status {
            401 => "WWW-Authenticate: Bearer\r\n",
            429 | 503 => "Retry-After: 1\r\n",
            _ => "",
        };
        let headers = allow.as_deref().unwrap_or(extra);
        self.respond(id, error.status, JSON, headers, error.json().to_string().as_bytes(), framed, now_ms);
    }

    /// A response is written whole.
    fn finished(&mut self, id: ConnectionId, framed: Framed, now_ms: u64) {
        let Some(c) = self.connections.get_mut(&id) else { return };
        c.exchange = None;
        c.closing = !framed.keep_alive;
        c.waiting_since_ms = now_ms;
    }

    fn route(
        &mut self,
        id: ConnectionId,
        request: &Request,
        framed: Framed,
        now_ms: u64,
    ) -> Result<(), ApiError> {
        let post = match request.path.as_str() {
            path if path.starts_with(ONE_MODEL) => false,
            "/health" | "/v1/health" | "/v1/models" | "/models" | "/metrics" => false,
            "/v1/completions" | "/v1/chat/completions" | "/v1/embeddings" | "/tokenize" | "/detokenize" => {
                true
            }
            path => return Err(ApiError::new(404, format!("no such path: {path}"))),
        };
        let (allowed, allow): (&[&str], _) =
            if post { (&["POST"], "POST") } else { (&["GET", "HEAD"], "GET, HEAD") };
        if !allowed.contains(&request.method.as_str()) {
            let what = format!("{} does not take {}; use {allow}", request.path, request.method);
            return Err(ApiError { allow: Some(allow), ..ApiError::new(405, what) });
        }
        let is_health = request.path.ends_with("/health");
        if self.draining && !is_health {
            return Err(ApiError::new(503, "the server is shutting down"));
        }
        if let Some(key) = self.config.api_key.as_deref().filter(|_| !is_health)
            && !request.bearer.as_deref().is_some_and(|given| same(given.as_bytes(), key.as_bytes()))
        {
            return Err(ApiError::new(401, "this server needs its key: Authorization: Bearer KEY"));
        }
        match request.path.as_str() {
            "/health" | "/v1/health" => self.respond_json(id, &json!({ "status": "ok" }), framed, now_ms),
            "/metrics" => {
                let text = self.metrics.text(&self.gauges());
                let kind = "text/plain; version=0.0.4; charset=utf-8";
                self.respond(id, 200, kind, "", text.as_bytes(), framed, now_ms);
            }
            "/v1/models" | "/models" => {
                let value = json!({ "object": "list", "data": [self.model_object()] });
                self.respond_json(id, &value, framed, now_ms);
            }
            path if path.starts_with(ONE_MODEL) => {
                self.check_name(&path[ONE_MODEL.len()..])?;
                self.respond_json(id, &self.model_object(), framed, now_ms);
            }
            path => {
                let object = api::object(&request.body)?;
                let fields = Fields(&object);
                match path {
                    "/tokenize" => {
                        let what = api::tokenize(&fields)?;
                        let options = EncodeOptions {
                            add_special: what.add_special,
                            parse_special: what.parse_special,
                        };
                        let tokens = reply::ids(&self.encode(&what.content, options)?);
                        self.check_answer("content", "tokens", tokens.len())?;
                        let body = format!("{{\"tokens\":{tokens}}}");
                        self.respond(id, 200, JSON, "", body.as_bytes(), framed, now_ms);
                    }
                    "/detokenize" => {
                        let tokens = api::detokenize(&fields)?;
                        self.check_tokens("tokens", &tokens)?;
                        self.check_text_of(&tokens)?;
                        let options = DecodeOptions { remove_special: false, unparse_special: true };
                        let bytes = self.model.tokenizer().decode(&tokens, options);
                        let text = String::from_utf8_lossy(&bytes);
                        self.respond_json(id, &json!({ "content": text }), framed, now_ms);
                    }
                    "/v1/embeddings" => self.start_embeddings(id, &fields, framed, now_ms)?,
                    path => {
                        let chat = path == "/v1/chat/completions";
                        self.start_completion(id, &fields, chat, framed, now_ms)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn gauges(&self) -> Gauges {
        let s = self.scheduler.as_ref();
        Gauges {
            active: s.map_or(0, Scheduler::n_active),
            queued: s.map_or(0, Scheduler::n_queued) + self.embeddings.len(),
            connections: self.connections.len(),
            kv_usage: s.map_or(0.0, Scheduler::kv_usage),
        }
    }

    /// The model in OpenAI's words, with more about it under `meta`.
    fn model_object(&self) -> Value {
        let hp = self.model.hparams();
        let n_ctx = self.scheduler.as_ref().map(Scheduler::n_ctx);
        json!({
            "id": self.config.model_name,
            "object": "model",
            "created": self.config.epoch_s,
            "owned_by": "runik",
            "meta": {
                "architecture": self.model.arch_name(),
                "n_vocab": hp.n_vocab,
                "n_embd": hp.n_embd,
                "n_ctx_train": hp.n_ctx_train,
                "n_ctx": n_ctx.or(self.embedder.as_ref().map(Context::n_ctx)),
                "size": self.model.meta().file_bytes,
            },
        })
    }

    fn check_name(&self, name: &str) -> Result<(), ApiError> {
        let ours = self.config.model_name.as_str();
        if name == ours {
            return Ok(());
        }
        Err(ApiError {
            param: Some("model".into()),
            ..ApiError::new(404, format!("no model '{name}'; this server has '{ours}'"))
        })
    }

    fn check_model(&self, fields: &Fields<'_>) -> Result<(), ApiError> {
        match fields.model()? {
            Some(name) if !name.is_empty() => self.check_name(name),
            _ => Ok(()),
        }
    }

    fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, ApiError> {
        let tokens = self.model.tokenizer().encode(text.as_bytes(), options);
        tokens.map_err(|e| ApiError::new(400, e.to_string()))
    }

    fn check_tokens(&self, name: &str, tokens: &[u32]) -> Result<(), ApiError> {
        let n_vocab = self.model.hparams().n_vocab;
        match tokens.iter().find(|&&t| t as usize >= n_vocab) {
            Some(t) => Err(ApiError::field(name, &format!("token {t}, the vocabulary has {n_vocab}"))),
            None => Ok(()),
        }
    }

    /// A token's text may be far longer than its number: what is asked for is bounded as what is sent.
    fn check_text_of(&self, tokens: &[u32]) -> Result<(), ApiError> {
        let (tokenizer, max) = (self.model.tokenizer(), self.config.limits.body_bytes);
        let add = |sum: usize, &token: &u32| {
            Some(sum + tokenizer.piece(token, true).len()).filter(|sum| *sum <= max)
        };
        match tokens.iter().try_fold(0, add) {
            Some(_) => Ok(()),
            None => Err(ApiError::field("tokens", &format!("their text is longer than {max} bytes"))),
        }
    }

    /// Refuses what is answered with more than answers may have; `name` is the field that asks for it.
    fn check_answer(&self, name: &str, what: &str, n_bytes: usize) -> Result<(), ApiError> {
        let max = self.config.limits.answer_bytes;
        if n_bytes <= max {
            return Ok(());
        }
        let problem =
            format!("its {what} may take {n_bytes} bytes, an answer at most {max}; send less at a time");
        Err(ApiError::field(name, &problem))
    }

    /// Tokens of a prompt that is no chat; special tokens in it are read where `parse_special`.
    fn tokens_of(&self, name: &str, prompt: Prompt, parse_special: bool) -> Result<Vec<u32>, ApiError> {
        let tokens = match prompt {
            Prompt::Text(text) => self.encode(&text, EncodeOptions { add_special: true, parse_special })?,
            Prompt::Tokens(tokens) => {
                self.check_tokens(name, &tokens)?;
                tokens
            }
        };
        if tokens.is_empty() { Err(ApiError::field(name, "it has no tokens")) } else { Ok(tokens) }
    }

    fn start_completion(
        &mut self,
        id: ConnectionId,
        fields: &Fields<'_>,
        chat: bool,
        framed: Framed,
        now_ms: u64,
    ) -> Result<(), ApiError> {
        let Some(scheduler) = &self.scheduler else {
            return Err(ApiError::new(
                501,
                "this server computes embeddings only; the model generates no text",
            ));
        };
        let (n_ctx, n_queued) = (scheduler.n_ctx(), scheduler.n_queued());
        self.check_model(fields)?;
        let generation = api::generation(fields, chat, &self.config.sampling)?;
        let prompt = if chat {
            let messages = api::messages(fields)?;
            let tokens = self.templates.encode(&messages, self.model.tokenizer());
            tokens.map_err(|message| ApiError {
                param: Some("messages".into()),
                ..ApiError::new(400, message)
            })?
        } else {
            // As llama-server does: a raw prompt may be a rendered template.
            self.tokens_of("prompt", api::prompt(fields)?, true)?
        };
        if prompt.is_empty() {
            return Err(ApiError::field("messages", "the prompt has no tokens"));
        }
        if prompt.len() >= n_ctx {
            return Err(ApiError::too_long(prompt.len(), n_ctx));
        }
        if n_queued >= self.config.limits.queue {
            return Err(ApiError::new(429, format!("{n_queued} requests wait already; try again later")));
        }
        self.check_tokens("messages", &prompt)?;
        self.submit(id, prompt, generation, chat, framed, now_ms);
        Ok(())
    }

    fn submit(
        &mut self,
        id: ConnectionId,
        prompt: Vec<u32>,
        generation: Generation,
        chat: bool,
        framed: Framed,
        now_ms: u64,
    ) {
        // Without chunks, what ends a stream is the connection's end.
        let keep_alive = framed.keep_alive && (framed.chunks || !generation.stream);
        let framed = Framed { keep_alive, ..framed };
        let seed = generation.seed.or(self.config.seed).unwrap_or_else(|| self.seeds.next_u64());
        let scheduler = self.scheduler.as_mut().expect("checked by the caller");
        let job = scheduler.submit(Job {
            prompt,
            sampling: SamplerParams { seed, ..generation.sampling },
            max_tokens: generation.max_tokens.or(self.config.max_tokens).unwrap_or(usize::MAX),
            stop: generation.stop,
            ignore_eos: generation.ignore_eos,
            logprobs: generation.logprobs,
        });
        self.jobs.insert(job, id);
        self.next_request += 1;
        let prefix = if chat { "chatcmpl" } else { "cmpl" };
        let completion = Completion {
            chat,
            id: format!("{prefix}-{}", self.next_request),
            created_s: self.config.epoch_s + now_ms / 1000,
            model: self.config.model_name.clone(),
            include_usage: generation.include_usage,
            logprobs: generation.logprobs.is_some(),
            n_chars: 0,
            whole: Whole::default(),
        };
        let stream = generation.stream;
        if stream {
            self.write(id, now_ms, |out| {
                http::start_stream(out, framed);
                if let Some(value) = completion.opening() {
                    http::stream(out, reply::sse(&value).as_bytes(), framed);
                }
            });
        }
        let kind = Kind::Completion { job, stream, completion: Box::new(completion) };
        if let Some(c) = self.connections.get_mut(&id) {
            c.exchange = Some(Exchange { framed, began_ms: now_ms, has_token: false, kind });
        }
    }

    fn start_embeddings(
        &mut self,
        id: ConnectionId,
        fields: &Fields<'_>,
        framed: Framed,
        now_ms: u64,
    ) -> Result<(), ApiError> {
        let Some(embedder) = &self.embedder else {
            return Err(ApiError::new(501, "this server computes no embeddings; start it with --embeddings"));
        };
        let n_ctx = embedder.n_ctx();
        self.check_model(fields)?;
        if self.embeddings.len() >= self.config.limits.queue {
            return Err(ApiError::new(429, "too many requests wait already; try again later"));
        }
        let encoding = api::vector_encoding(fields)?;
        let mut inputs = VecDeque::new();
        let given = api::inputs(fields)?;
        let n_embd = self.model.hparams().n_embd;
        let n_bytes = reply::max_embeddings_bytes(given.len(), n_embd, encoding);
        self.check_answer("input", "vectors", n_bytes)?;
        for input in given {
            let tokens = self.tokens_of("input", input, false)?;
            if tokens.len() > n_ctx {
                return Err(ApiError::too_long(tokens.len(), n_ctx));
            }
            inputs.push_back(tokens);
        }
        let n_tokens = inputs.iter().map(Vec::len).sum();
        self.embeddings.push_back(id);
        let kind = Kind::Embeddings { inputs, vectors: Vec::new(), encoding, n_tokens };
        if let Some(c) = self.connections.get_mut(&id) {
            c.exchange = Some(Exchange { framed, began_ms: now_ms, has_token: false, kind });
        }
        Ok(())
    }

    /// Computes one embedding of the request that waits longest; its answer goes out with the last.
    fn embed_one(&mut self, clock: &dyn Fn() -> u64) {
        let Some(id) = self.embeddings.pop_front() else { return };
        let (Some(embedder), Some(c)) = (&mut self.embedder, self.connections.get_mut(&id)) else { return };
        let Some(Exchange { framed, kind: Kind::Embeddings { inputs, vectors, encoding, n_tokens }, .. }) =
            &mut c.exchange
        else {
            return;
        };
        let (framed, encoding, n_tokens) = (*framed, *encoding, *n_tokens);
        if let Some(tokens) = inputs.pop_front() {
            let pooling = match self.model.hparams().pooling {
                // One vector a text is what the API promises; llama.cpp's default for decoders is the last token.
                Pooling::None => Pooling::Last,
                pooling => pooling,
            };
            match embedder.embed(&tokens, pooling) {
                Ok(vector) => vectors.push(normalised(vector)),
                Err(e) => return self.refuse(id, &ApiError::new(500, e.to_string()), framed, clock()),
            }
            self.metrics.prompt_tokens += tokens.len() as u64;
        }
        if !inputs.is_empty() {
            // Its next input waits behind the other requests.
            return self.embeddings.push_back(id);
        }
        let body = reply::embeddings(vectors, encoding, &self.config.model_name, n_tokens);
        let now_ms = clock();
        self.respond(id, 200, JSON, "", body.as_bytes(), framed, now_ms);
        self.advance(id, now_ms);
    }

    /// Passes news of a job to its client.
    fn deliver(&mut self, event: Event, now_ms: u64) {
        let Some(&id) = self.jobs.get(&event.job) else { return };
        let tokenizer = self.model.tokenizer();
        let Some(c) = self.connections.get_mut(&id) else { return };
        let Some(Exchange { framed, began_ms, has_token, kind: Kind::Completion { stream, completion, .. } }) =
            &mut c.exchange
        else {
            return;
        };
        let (framed, began_ms, stream) = (*framed, *began_ms, *stream);
        let mut is_full = false;
        if !core::mem::replace(has_token, true) {
            self.metrics.first_tokens += 1;
            self.metrics.first_token_ms += now_ms.saturating_sub(began_ms);
        }
        let end = event.end.as_ref().and_then(|end| end.as_ref().ok());
        let failed = event.end.as_ref().and_then(|end| end.as_ref().err());
        let mut new = Vec::new();
        if !stream {
            completion.add(&event.text, event.logprob.as_ref(), tokenizer);
            is_full = event.end.is_none() && completion.whole.len() >= self.config.limits.answer_bytes;
            if let Some(end) = end {
                let body = completion.whole(end);
                http::respond(&mut new, 200, JSON, "", body.as_bytes(), framed);
            }
        } else {
            let mut send = |text: &str| http::stream(&mut new, text.as_bytes(), framed);
            if failed.is_none() && !(event.text.is_empty() && event.logprob.is_none() && end.is_none()) {
                send(&reply::sse(&completion.chunk(&event.text, event.logprob.as_ref(), end, tokenizer)));
                completion.n_chars += event.text.chars().count();
            }
            if let Some(end) = end.filter(|_| completion.include_usage) {
                send(&reply::sse(&completion.usage_chunk(end)));
            }
            if let Some(error) = failed {
                send(&reply::sse(&ApiError::new(500, error.to_string()).json()));
            }
            if event.end.is_some() {
                send("data: [DONE]\n\n");
                http::end_stream(&mut new, framed);
            }
        }
        self.write(id, now_ms, |out| out.extend_from_slice(&new));
        if let Some(end) = end {
            self.metrics.cached_tokens += end.cached_tokens as u64;
            self.metrics.completed += 1;
            self.metrics.latency_ms += now_ms.saturating_sub(began_ms);
        }
        if event.end.is_some() {
            self.jobs.remove(&event.job);
            match failed {
                Some(error) if !stream => {
                    self.refuse(id, &ApiError::new(500, error.to_string()), framed, now_ms)
                }
                Some(_) => {
                    self.metrics.errors += 1;
                    self.finished(id, framed, now_ms);
                }
                None => self.finished(id, framed, now_ms),
            }
            // Requests that the client sent ahead.
            self.advance(id, now_ms);
        }
        if is_full && let Some(last) = self.scheduler.as_mut().and_then(|s| s.cut_short(event.job)) {
            return self.deliver(last, now_ms);
        }
        // A whole answer may be longer; a stream that nobody reads has no end.
        let max = self.config.limits.output_bytes;
        if self.connections.get(&id).is_some_and(|c| c.exchange.is_some() && c.out.len() > max) {
            self.cut_off(id);
        }
    }
}

/// `GET` of this and a name is about that model.
const ONE_MODEL: &str = "/v1/models/";

const JSON: &str = "application/json; charset=utf-8";

/// A response after which the connection's framing is unknown.
const LAST: Framed = Framed { keep_alive: false, chunks: false, head_only: false };

/// Equality in a time that does not tell where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

/// A vector of length 1, as OpenAI's and llama-server's are.
fn normalised(mut vector: Vec<f32>) -> Vec<f32> {
    let norm = libm::sqrt(vector.iter().map(|&v| v as f64 * v as f64).sum::<f64>());
    if norm > 0.0 {
        vector.iter_mut().for_each(|v| *v = (*v as f64 / norm) as f32);
    }
    vector
}
