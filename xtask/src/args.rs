//! Command lines of tasks: `--name value` pairs, checked against the names a task knows.

use crate::error::TaskError;

/// No arguments, or a usage error.
pub fn none(task: &str, args: &[String]) -> Result<(), TaskError> {
    match args.first() {
        None => Ok(()),
        Some(arg) => Err(TaskError::Usage { what: format!("{task} takes no argument, got {arg:?}") }),
    }
}

/// The values of `--name value` pairs, in the order of `names`; `None` for those not given.
pub fn options<const N: usize>(
    task: &str,
    names: [&str; N],
    args: &[String],
) -> Result<[Option<String>; N], TaskError> {
    let mut values = [const { None }; N];
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let known = names.iter().position(|name| name == arg);
        let slot = known.ok_or_else(|| TaskError::Usage {
            what: format!("{task} does not know {arg:?}; it takes {}", names.join(", ")),
        })?;
        let value =
            args.next().ok_or_else(|| TaskError::Usage { what: format!("{task}: {arg} needs a value") })?;
        values[slot] = Some(value.clone());
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn options_are_matched_by_name() {
        let [a, b] = options("t", ["--a", "--b"], &words("--b 2")).unwrap();
        assert_eq!((a, b.as_deref()), (None, Some("2")));
    }

    #[test]
    fn unknown_names_and_lost_values_are_usage_errors() {
        for line in ["--c 1", "--a", "stray"] {
            assert!(matches!(options("t", ["--a"], &words(line)), Err(TaskError::Usage { .. })), "{line}");
        }
    }
}
