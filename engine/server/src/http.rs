//! HTTP/1.1: bytes to requests, responses to bytes.
//!
//! [`Reader`] takes bytes in any pieces; the requests it gives do not depend on where the pieces were cut. It holds at
//! most a head, a body and what came behind them, all bounded. After an error the connection has no known framing and
//! must be closed. A message with both a length and chunks, or with two lengths, is refused: those smuggle requests.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use crate::error::ApiError;

/// Headers in one request.
const MAX_HEADERS: usize = 64;

/// A line that gives a chunk's size, with extensions; also each trailer.
const MAX_CHUNK_LINE_BYTES: usize = 256;

/// Trailers after a chunked body; nobody needs them.
const MAX_TRAILERS: usize = 16;

/// White space around a value. No other is: who takes more of it for such reads another length.
const BLANKS: [char; 2] = [' ', '\t'];

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// Whether the client keeps the connection.
    pub keep_alive: bool,
    /// HTTP/1.1, so that chunks are understood.
    pub http11: bool,
    /// The credential of `Authorization: Bearer`.
    pub bearer: Option<String>,
    /// The body, without its framing.
    pub body: Vec<u8>,
}

/// What a reader found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// The client waits for `100 Continue` before it sends the body.
    Continue,
    /// A whole request.
    Request(Request),
}

enum State {
    Head,
    Length { request: Request, n: usize },
    ChunkSize { request: Request },
    ChunkData { request: Request, n: usize },
    Trailers { request: Request, n: usize },
    Failed,
}

/// Cuts the bytes of a connection into requests.
pub struct Reader {
    max_head: usize,
    max_body: usize,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are taken; they go at the next push, so that many small pieces cost one move.
    taken: usize,
    /// Bytes of the rest in which no head ends.
    searched: usize,
    state: State,
}

impl Reader {
    /// A reader for heads and bodies of at most so many bytes.
    pub fn new(max_head: usize, max_body: usize) -> Reader {
        Reader { max_head, max_body, buffer: Vec::new(), taken: 0, searched: 0, state: State::Head }
    }

    /// Takes bytes; none after an error.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Failed) {
            self.buffer.drain(..core::mem::take(&mut self.taken));
            self.buffer.extend_from_slice(bytes);
        }
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    /// Whether more bytes may come; otherwise requests wait to be taken.
    pub fn has_room(&self) -> bool {
        self.rest().len() <= self.max_head + self.max_body
    }

    /// Whether part of a request is here.
    pub fn is_inside(&self) -> bool {
        !self.rest().is_empty() || !matches!(self.state, State::Head | State::Failed)
    }

    /// The next thing found; `None` if it is not complete.
    pub fn poll(&mut self) -> Result<Option<Incoming>, ApiError> {
        let result = self.advance();
        if result.is_err() {
            self.state = State::Failed;
            (self.buffer, self.taken) = (Vec::new(), 0);
        }
        result
    }

    fn advance(&mut self) -> Result<Option<Incoming>, ApiError> {
        loop {
            match core::mem::replace(&mut self.state, State::Head) {
                State::Failed => {
                    self.state = State::Failed;
                    return Ok(None);
                }
                State::Head => {
                    let Some(end) = self.head_end()? else { return Ok(None) };
                    let (request, framing, expects) = parse_head(&self.rest()[..end])?;
                    self.taken += end;
                    self.searched = 0;
                    self.state = match framing {
                        Framing::Length(n) if n > self.max_body => return Err(self.body_too_large()),
                        Framing::Length(n) => State::Length { request, n },
                        Framing::Chunked => State::ChunkSize { request },
                    };
                    // A client that has sent part of the body does not wait.
                    let no_body = matches!(self.state, State::Length { n: 0, .. });
                    if expects && !no_body && self.rest().is_empty() {
                        return Ok(Some(Incoming::Continue));
                    }
                }
                State::Length { mut request, n } => {
                    if self.rest().len() < n {
                        self.state = State::Length { request, n };
                        return Ok(None);
                    }
                    request.body = self.take(n);
                    return Ok(Some(Incoming::Request(request)));
                }
                State::ChunkSize { request } => match self.line()? {
                    None => {
                        self.state = State::ChunkSize { request };
                        return Ok(None);
                    }
                    Some(line) => {
                        let n = chunk_size(&line)?;
                        if n > self.max_body - request.body.len() {
                            return Err(self.body_too_large());
                        }
                        self.state = match n {
                            0 => State::Trailers { request, n: 0 },
                            n => State::ChunkData { request, n },
                        };
                    }
                },
                State::ChunkData { mut request, n } => {
                    if self.rest().len() < n + 2 {
                        self.state = State::ChunkData { request, n };
                        return Ok(None);
                    }
                    let data = self.take(n);
                    request.body.extend_from_slice(&data);
                    if self.take(2) != b"\r\n" {
                        return Err(bad("a chunk is not followed by CR LF"));
                    }
                    self.state = State::ChunkSize { request };
                }
                State::Trailers { request, n } => match self.line()? {
                    None => {
                        self.state = State::Trailers { request, n };
                        return Ok(None);
                    }
                    Some(line) if line.is_empty() => return Ok(Some(Incoming::Request(request))),
                    Some(_) if n >= MAX_TRAILERS => return Err(ApiError::new(431, "too many trailers")),
                    Some(_) => self.state = State::Trailers { request, n: n + 1 },
                },
            }
        }
    }

    /// Where the head ends, if it does.
    fn head_end(&mut self) -> Result<Option<usize>, ApiError> {
        // Empty lines before a request are allowed.
        if self.searched == 0 {
            self.taken += self.rest().iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        }
        let end = blank_line(self.rest(), self.searched.saturating_sub(3));
        self.searched = self.rest().len();
        match end {
            Some(end) if end <= self.max_head => Ok(Some(end)),
            None if self.rest().len() <= self.max_head => Ok(None),
            _ => Err(ApiError::new(431, format!("the head is longer than {} bytes", self.max_head))),
        }
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        let bytes = self.rest()[..n].to_vec();
        self.taken += n;
        bytes
    }

    /// A line that ends with CR LF, without it.
    fn line(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        let rest = self.rest();
        match rest[..rest.len().min(MAX_CHUNK_LINE_BYTES)].windows(2).position(|pair| pair == b"\r\n") {
            Some(end) => {
                let mut line = self.take(end + 2);
                line.truncate(end);
                Ok(Some(line))
            }
            None if rest.len() < MAX_CHUNK_LINE_BYTES => Ok(None),
            None => Err(bad("a chunk's size line is too long")),
        }
    }

    fn body_too_large(&self) -> ApiError {
        ApiError::new(413, format!("the body is longer than {} bytes", self.max_body))
    }
}

fn bad(what: &str) -> ApiError {
    ApiError::new(400, format!("malformed HTTP request: {what}"))
}

/// End of the first empty line that begins behind `from`.
fn blank_line(bytes: &[u8], from: usize) -> Option<usize> {
    let ends = |i: usize| match bytes.get(i..)? {
        [b'\n', b'\n', ..] => Some(i + 2),
        [b'\n', b'\r', b'\n', ..] => Some(i + 3),
        _ => None,
    };
    (from..bytes.len()).find_map(ends)
}

enum Framing {
    Length(usize),
    Chunked,
}

/// A head: the request without its body, how the body comes, whether the client waits for `100 Continue`.
fn parse_head(head: &[u8]) -> Result<(Request, Framing, bool), ApiError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(n)) if n == head.len() => {}
        Ok(_) => return Err(bad("the head ends too early")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(ApiError::new(431, format!("more than {MAX_HEADERS} headers")));
        }
        Err(e) => return Err(bad(&format!("{e}"))),
    }
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(bad("no request line"));
    };
    let http11 = version == 1;
    let (mut length, mut chunked, mut expects, mut keep_alive, mut bearer, mut hosts) =
        (None, false, false, http11, None, 0);
    for header in parsed.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = core::str::from_utf8(header.value).unwrap_or_default().trim_matches(BLANKS);
        if is("content-length") {
            let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
            let n = value.parse::<usize>().ok().filter(|_| digits);
            // A number too large for usize is too large for any limit.
            let n = n.or((digits && value.len() < 32).then_some(usize::MAX));
            let n = n.ok_or_else(|| bad("Content-Length is no number"))?;
            if length.replace(n).is_some() {
                return Err(bad("two Content-Length headers"));
            }
        } else if is("transfer-encoding") {
            if chunked || !value.eq_ignore_ascii_case("chunked") {
                return Err(ApiError::new(501, "Transfer-Encoding: only chunked is supported"));
            }
            chunked = true;
        } else if is("expect") {
            if !value.eq_ignore_ascii_case("100-continue") {
                return Err(ApiError::new(417, "Expect: only 100-continue is supported"));
            }
            expects = http11;
        } else if is("connection") {
            for word in value.split(',').map(|word| word.trim_matches(BLANKS)) {
                keep_alive &= !word.eq_ignore_ascii_case("close");
                keep_alive |= !http11 && word.eq_ignore_ascii_case("keep-alive");
            }
        } else if is("host") {
            hosts += 1;
        } else if is("authorization") {
            bearer = value
                .split_once(' ')
                .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
                .map(|(_, key)| key.trim_matches(BLANKS).into());
        }
    }
    if http11 && hosts != 1 {
        return Err(bad("HTTP/1.1 needs one Host header"));
    }
    let framing = match (length, chunked) {
        (Some(_), true) => return Err(bad("both Content-Length and Transfer-Encoding")),
        (None, true) if !http11 => return Err(bad("chunks in HTTP/1.0")),
        (None, true) => Framing::Chunked,
        (n, false) => Framing::Length(n.unwrap_or(0)),
    };
    let path = target.split('?').next().unwrap_or_default();
    let request =
        Request { method: method.into(), path: path.into(), keep_alive, http11, bearer, body: Vec::new() };
    Ok((request, framing, expects))
}

/// The size in a chunk's line; extensions are skipped.
fn chunk_size(line: &[u8]) -> Result<usize, ApiError> {
    let digits = line.split(|&b| b == b';').next().unwrap_or_default();
    let text = core::str::from_utf8(digits).unwrap_or_default().trim_end_matches(BLANKS);
    // from_str_radix takes a sign, HTTP does not.
    if !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad("a chunk's size is no number"));
    }
    usize::from_str_radix(text, 16).map_err(|_| bad("a chunk's size is no number"))
}

/// How a response is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framed {
    /// The connection goes on afterwards.
    pub keep_alive: bool,
    /// The client reads chunks; otherwise a stream ends with the connection.
    pub chunks: bool,
    /// An answer to HEAD: no body.
    pub head_only: bool,
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

fn start(out: &mut Vec<u8>, status: u16, content_type: &str, framed: Framed) {
    let connection = if framed.keep_alive { "keep-alive" } else { "close" };
    let reason = reason(status);
    out.extend_from_slice(
        format!(
            "HTTP/1.1 {status} {reason}\r\nServer: runik\r\nContent-Type: {content_type}\r\nConnection: {connection}\r\n"
        )
        .as_bytes(),
    );
}

/// Writes a whole response; `headers` are lines that end with CR LF.
pub fn respond(
    out: &mut Vec<u8>,
    status: u16,
    content_type: &str,
    headers: &str,
    body: &[u8],
    framed: Framed,
) {
    start(out, status, content_type, framed);
    out.extend_from_slice(format!("{headers}Content-Length: {}\r\n\r\n", body.len()).as_bytes());
    if !framed.head_only {
        out.extend_from_slice(body);
    }
}

/// Writes the head of an event stream.
pub fn start_stream(out: &mut Vec<u8>, framed: Framed) {
    start(out, 200, "text/event-stream", framed);
    out.extend_from_slice(b"Cache-Control: no-cache\r\n");
    out.extend_from_slice(if framed.chunks { b"Transfer-Encoding: chunked\r\n\r\n" } else { b"\r\n" });
}

/// Writes a piece of a stream.
pub fn stream(out: &mut Vec<u8>, data: &[u8], framed: Framed) {
    if framed.chunks {
        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
    }
    out.extend_from_slice(data);
    if framed.chunks {
        out.extend_from_slice(b"\r\n");
    }
}

/// Writes the end of a stream.
pub fn end_stream(out: &mut Vec<u8>, framed: Framed) {
    if framed.chunks {
        out.extend_from_slice(b"0\r\n\r\n");
    }
}

/// Where a client's `100 Continue` goes.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Deepest nesting of a JSON text, strings aside; the parser's recursion is bounded by it.
pub fn json_depth(text: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string) = (0usize, 0, false);
    let mut skip: Range<usize> = 0..0;
    for (i, byte) in text.iter().enumerate() {
        if skip.contains(&i) {
            continue;
        }
        match byte {
            b'\\' if in_string => skip = i + 1..i + 2,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}
