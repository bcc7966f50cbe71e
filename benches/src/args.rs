//! Command lines of both programs: `--name value` pairs, flags, and words.

use crate::BenchError;

/// A command line, taken apart piece by piece; [`Args::finish`] refuses what is left.
#[derive(Clone, Debug)]
pub struct Args(Vec<String>);

impl Args {
    /// The process's arguments.
    pub fn from_env() -> Args {
        Args(std::env::args().skip(1).collect())
    }

    /// Whether the flag is given.
    pub fn flag(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|arg| arg != name);
        self.0.len() != before
    }

    /// The value after `name`, if the name is given.
    pub fn value(&mut self, name: &str) -> Result<Option<String>, BenchError> {
        let Some(at) = self.0.iter().position(|arg| arg == name) else { return Ok(None) };
        self.0.remove(at);
        if at < self.0.len() {
            Ok(Some(self.0.remove(at)))
        } else {
            Err(BenchError::Usage(format!("{name} needs a value")))
        }
    }

    /// The value after `name` as a number.
    pub fn number(&mut self, name: &str) -> Result<Option<u32>, BenchError> {
        let number = |text: String| {
            text.parse().map_err(|_| BenchError::Usage(format!("{name} {text}: expected a number")))
        };
        self.value(name)?.map(number).transpose()
    }

    /// The first word that is no option.
    pub fn word(&mut self) -> Option<String> {
        let at = self.0.iter().position(|arg| !arg.starts_with("--"))?;
        Some(self.0.remove(at))
    }

    /// Nothing may be left.
    pub fn finish(self, usage: &str) -> Result<(), BenchError> {
        match self.0.first() {
            None => Ok(()),
            Some(arg) => Err(BenchError::Usage(format!("unknown argument {arg}\n{usage}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_taken_and_the_rest_is_refused() {
        let mut args = Args(["--json", "f", "mmvq", "--warm", "--device", "1"].map(String::from).to_vec());
        assert!(args.flag("--warm") && !args.flag("--warm"));
        assert_eq!(args.value("--json").unwrap().as_deref(), Some("f"));
        assert_eq!(args.number("--device").unwrap(), Some(1));
        assert_eq!(args.word().as_deref(), Some("mmvq"));
        args.clone().finish("usage").unwrap();
        args.0.push("--what".into());
        assert!(args.value("--what").is_err());
        args.0.push("--what".into());
        assert!(matches!(args.finish("usage"), Err(BenchError::Usage(text)) if text.contains("--what")));
    }
}
