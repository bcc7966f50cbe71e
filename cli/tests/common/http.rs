//! A plain HTTP client for tests: requests as text, responses as they come.

#![allow(dead_code)] // each test file uses its part

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// A server that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection, used for one request after the other.
pub struct Client {
    socket: TcpStream,
    reader: BufReader<TcpStream>,
}

/// A whole response.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    /// The head without the status line.
    pub head: String,
    pub body: String,
}

impl Response {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The data of an event stream, which must end as one does.
    pub fn events(&self) -> Vec<Value> {
        let data: Vec<_> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (last, events) = data.split_last().expect("events");
        assert_eq!(*last, "[DONE]", "{}", self.body);
        events.iter().map(|text| serde_json::from_str(text).unwrap()).collect()
    }

    /// The answer's text: of a whole one or of a stream, of a chat or of a plain completion.
    pub fn text(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        if self.head.contains("text/event-stream") {
            return self.events().iter().map(|event| piece(event).to_owned()).collect();
        }
        piece(&self.json()).to_owned()
    }
}

/// The text in one object of an answer.
fn piece(value: &Value) -> &str {
    let choice = &value["choices"][0];
    let texts = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
    texts.iter().find_map(|text| text.as_str()).unwrap_or("")
}

/// A request's text.
pub fn request(method: &str, path: &str, body: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

impl Client {
    /// Connects to `host:port`.
    pub fn connect(address: &str) -> Client {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        Client { reader: BufReader::new(socket.try_clone().unwrap()), socket }
    }

    /// The socket, for what no decent client does.
    pub fn socket(&mut self) -> &mut TcpStream {
        &mut self.socket
    }

    /// Sends a GET and reads its response.
    pub fn get(&mut self, path: &str) -> Response {
        self.send(&request("GET", path, ""));
        self.response()
    }

    /// Sends a POST and reads its response.
    pub fn post(&mut self, path: &str, body: &Value) -> Response {
        self.send(&request("POST", path, &body.to_string()));
        self.response()
    }

    /// Sends this text.
    pub fn send(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).unwrap();
    }

    /// Reads a response.
    pub fn response(&mut self) -> Response {
        let (status, head) = self.head();
        let mut body = Vec::new();
        if head.contains("Transfer-Encoding: chunked") {
            while let Some(chunk) = self.chunk() {
                body.extend(chunk);
            }
        } else {
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            body.resize(length.expect("a length").parse().unwrap(), 0);
            self.reader.read_exact(&mut body).unwrap();
        }
        Response { status, head, body: String::from_utf8(body).unwrap() }
    }

    /// Reads a status and a head.
    pub fn head(&mut self) -> (u16, String) {
        let line = self.line();
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status: {line:?}"));
        let mut head = String::new();
        loop {
            let line = self.line();
            if line == "\r\n" {
                return (status, head);
            }
            assert!(line.ends_with("\r\n"), "the head ends early: {head}{line}");
            head += &line;
        }
    }

    /// Reads a chunk; `None` is the last.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.line();
        let length =
            usize::from_str_radix(line.trim_end(), 16).unwrap_or_else(|_| panic!("a chunk: {line:?}"));
        let mut chunk = vec![0; length + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        assert!(chunk.ends_with(b"\r\n"));
        chunk.truncate(length);
        (length > 0).then_some(chunk)
    }

    /// Whether the server has ended the connection, all before being read.
    pub fn is_ended(&mut self) -> bool {
        matches!(self.reader.read(&mut [0]), Ok(0))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line
    }
}
