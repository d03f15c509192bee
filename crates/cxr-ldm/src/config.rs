//! Reading the published `config.json` files: every key is used, refused or known not to matter.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::Error;

/// A configuration file, key by key.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    name: &'static str,
    keys: Map<String, Value>,
}

impl ConfigFile {
    /// Parses `text`; `name` stands in errors.
    pub(crate) fn parse(name: &'static str, text: &str) -> Result<Self, Error> {
        let error = |found: String| Error::Config {
            file: name.into(),
            key: "the file".into(),
            found,
            expected: "a JSON object".into(),
        };
        match serde_json::from_str(text) {
            Ok(Value::Object(keys)) => Ok(Self { name, keys }),
            Ok(other) => Err(error(other.to_string())),
            Err(e) => Err(error(format!("no JSON ({e})"))),
        }
    }

    /// Takes a key's value; `default` (that of the published class) if it is absent or null.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str, default: T) -> Result<T, Error> {
        match self.keys.remove(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|e| self.error(key, value.to_string(), format!("another value ({e})"))),
        }
    }

    /// Takes a key of which one value is implemented, the published class's default.
    pub(crate) fn fixed(&mut self, key: &str, only: impl Into<Value>) -> Result<(), Error> {
        let only = only.into();
        match self.keys.remove(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if same(&value, &only) => Ok(()),
            Some(value) => {
                Err(self.error(key, value.to_string(), format!("{only}, the only value that is implemented")))
            }
        }
    }

    /// Takes keys that change no result.
    pub(crate) fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.keys.remove(*key);
        }
    }

    /// Refuses what is left: a key that this version does not know may change the result.
    ///
    /// Switches that are off and keys of the file format itself (`_class_name`) are fine.
    pub(crate) fn finish(self) -> Result<(), Error> {
        let is_off = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
        match self.keys.iter().find(|(key, value)| !key.starts_with('_') && !is_off(value)) {
            None => Ok(()),
            Some((key, value)) => Err(self.error(key, value.to_string(), "no such key".into())),
        }
    }

    fn error(&self, key: &str, found: String, expected: String) -> Error {
        Error::Config { file: self.name.into(), key: key.into(), found, expected }
    }
}

/// Equal, `1` and `1.0` included.
fn same(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some_and(|a| Some(a) == b.as_f64())
}

/// An error about a value that was read.
pub(crate) fn wrong<T>(
    file: &str,
    key: &str,
    found: impl ToString,
    expected: impl Into<String>,
) -> Result<T, Error> {
    Err(Error::Config {
        file: file.into(),
        key: key.into(),
        found: found.to_string(),
        expected: expected.into(),
    })
}

/// The file for a configuration: its fields and the constant keys of its class.
pub(crate) fn to_json(config: &impl Serialize, constant: &[(&str, Value)]) -> String {
    let mut value = serde_json::to_value(config).expect("numbers, strings and lists are JSON");
    if let Value::Object(keys) = &mut value {
        keys.extend(constant.iter().map(|(key, value)| ((*key).to_string(), value.clone())));
    }
    serde_json::to_string_pretty(&value).expect("it is JSON already") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(usize, bool), Error> {
        let mut file = ConfigFile::parse("a/config.json", text)?;
        let found = (file.take("width", 8)?, file.take("flag", true)?);
        file.fixed("factor", 1)?;
        file.ignore(&["comment"]);
        file.finish()?;
        Ok(found)
    }

    #[test]
    fn values_defaults_and_keys_that_do_not_matter() {
        assert_eq!(read("{}").unwrap(), (8, true));
        let text =
            r#"{"width": 3, "flag": false, "factor": 1.0, "comment": "x", "_class_name": "y", "off": false}"#;
        assert_eq!(read(text).unwrap(), (3, false));
        assert_eq!(read(r#"{"width": null, "factor": null}"#).unwrap(), (8, true));
    }

    #[test]
    fn whatever_is_wrong_is_named() {
        for (text, word) in [
            (r#"{"width": "wide"}"#, "width"),
            (r#"{"width": -1}"#, "width"),
            (r#"{"factor": 2}"#, "factor"),
            (r#"{"novelty": 2}"#, "novelty"),
            (r#"{"novelty": true}"#, "novelty"),
            ("[]", "JSON object"),
            ("{", "JSON"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(word) && error.starts_with("a/config.json"), "{text}: {error}");
        }
    }
}
