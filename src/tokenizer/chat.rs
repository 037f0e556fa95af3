//! The chat template, in the dialect that Hugging Face tokenizers render.
//!
//! Templates are written for Jinja2 as `transformers` sets it up (`utils/chat_template_utils.py` there): blocks are
//! trimmed, Python's string methods work, and `raise_exception`, `strftime_now` and a `tojson` that escapes nothing
//! are at hand. This file makes minijinja behave like that, and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State};
use serde::Serialize;

use super::{Config, TokenizerError, invalid, read};
use crate::request::Chat;

/// A chat template and where it came from.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    path: PathBuf,
    source: String,
    environment: Environment<'static>,
    named_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template of a checkpoint: a file of its own, as newer checkpoints have it, before the field of the configuration.
    pub(super) fn find(
        directory: &Path,
        config: &Config,
        named_tokens: &BTreeMap<String, String>,
        now_s: i64,
    ) -> Result<Option<ChatTemplate>, TokenizerError> {
        let Some((path, source)) = find_source(directory, config)? else {
            return Ok(None);
        };
        Ok(Some(ChatTemplate {
            path,
            source: without_generation_tags(&source),
            environment: environment(now_s),
            named_tokens: named_tokens.clone(),
        }))
    }

    /// Whether the template tells the model of tools, and to call them in the form of Qwen and Hermes.
    pub(super) fn knows_tools(&self) -> bool {
        self.source.contains("tools") && self.source.contains("<tool_call>")
    }

    /// Writes the conversation, up to where the assistant's answer starts.
    pub(super) fn render(&self, chat: &Chat) -> Result<String, TokenizerError> {
        // Compiled each time: far cheaper than the prompt it writes, and a bad template harms only those that use it.
        let template = self.environment.template_from_str(&self.source);
        let text = template.and_then(|template| template.render(self.variables(chat)));
        text.map_err(|error| TokenizerError::ChatTemplate {
            path: self.path.clone(),
            what: describe(&error),
        })
    }

    /// The variables that a template may use; ours last, so that a request cannot replace them.
    fn variables<'a>(&'a self, chat: &'a Chat) -> BTreeMap<&'a str, Value> {
        let tokens = self
            .named_tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let arguments = chat.template_arguments.iter();
        let arguments =
            arguments.map(|(name, value)| (name.as_str(), Value::from_serialize(value)));
        // Templates ask whether there are tools by whether there is a list.
        let tools = match chat.tools.is_empty() {
            true => Value::from(()),
            false => Value::from_serialize(&chat.tools),
        };
        let ours = [
            ("messages", Value::from_serialize(&chat.messages)),
            ("add_generation_prompt", Value::from(true)),
            ("tools", tools),
            ("documents", Value::from(())),
        ];
        tokens.chain(arguments).chain(ours).collect()
    }
}

fn find_source(
    directory: &Path,
    config: &Config,
) -> Result<Option<(PathBuf, String)>, TokenizerError> {
    let path = directory.join("chat_template.jinja");
    if let Some(bytes) = read(&path)? {
        let source = String::from_utf8(bytes).map_err(|error| invalid(&path, error))?;
        return Ok(Some((path, source)));
    }
    let path = directory.join("chat_template.json");
    if let Some(bytes) = read(&path)? {
        let file: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| invalid(&path, error))?;
        let source = template_of(&path, file.get("chat_template"))?;
        return Ok(source.map(|source| (path, source)));
    }
    let path = directory.join(Config::FILE);
    let source = template_of(&path, config.chat_template.as_ref())?;
    Ok(source.map(|source| (path, source)))
}

/// The template in a `chat_template` field: a string, or the one named "default" of several.
fn template_of(
    path: &Path,
    field: Option<&serde_json::Value>,
) -> Result<Option<String>, TokenizerError> {
    use serde_json::Value;
    match field {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(named)) => {
            let default = named
                .iter()
                .find(|entry| entry.get("name").is_some_and(|name| name == "default"));
            let source = default.and_then(|entry| entry.get("template")?.as_str());
            let what = "`chat_template` is a list without a `template` named \"default\"";
            source
                .map(|source| Some(source.to_owned()))
                .ok_or_else(|| invalid(path, what))
        }
        Some(_) => Err(invalid(
            path,
            "`chat_template` must be a string or a list of named templates",
        )),
    }
}

/// `{% generation %}` marks, for training, what the assistant said; in the text it means nothing. minijinja does not know
/// the tag, so it becomes a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut parts = source.split("{%");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str("{%");
        let tag = part.split_once("%}").map_or(part, |(tag, _)| tag);
        match tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => text.push_str(&part.replacen("generation", " if true ", 1)),
            "endgeneration" => text.push_str(&part.replacen("endgeneration", " endif ", 1)),
            _ => text.push_str(part),
        }
    }
    text
}

/// Jinja2 as `transformers` sets it up.
fn environment(now_s: i64) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(print_as_python);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", move |format: &str| strftime(now_s, format));
    environment.add_filter("tojson", to_json);
    environment
}

/// Prints the three constants as Python spells them.
fn print_as_python(
    output: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let python = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return minijinja::escape_formatter(output, state, value),
    };
    output.write_str(python).map_err(Error::from)
}

/// The run's time in UTC, by a format of C's `strftime`.
fn strftime(now_s: i64, format: &str) -> Result<String, Error> {
    let time =
        jiff::Timestamp::from_second(now_s).map(|time| time.to_zoned(jiff::tz::TimeZone::UTC));
    let text = time.and_then(|time| jiff::fmt::strtime::format(format, &time));
    text.map_err(|error| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}): {error}"),
        )
    })
}

/// Python's `json.dumps` with the arguments that `transformers` gives the filter, except `sort_keys`.
fn to_json(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let is_ascii = arguments
        .get::<Option<bool>>("ensure_ascii")?
        .unwrap_or(false);
    let indent = arguments.get::<Option<usize>>("indent")?;
    let separators = arguments.get::<Option<Vec<String>>>("separators")?;
    arguments.assert_all_used()?;
    let (between_items, after_key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([between_items, after_key]) => (between_items.as_str(), after_key.as_str()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be two strings",
            ));
        }
    };
    let mut json = Vec::new();
    let formatter = PythonJson {
        between_items,
        after_key,
        indent,
        depth: 0,
        is_empty: true,
    };
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
    let failed = |error: String| Error::new(ErrorKind::BadSerialization, error);
    value
        .serialize(&mut serializer)
        .map_err(|error| failed(error.to_string()))?;
    let json = String::from_utf8(json).map_err(|error| failed(error.to_string()))?;
    Ok(Value::from(if is_ascii {
        escape_non_ascii(&json)
    } else {
        json
    }))
}

/// JSON laid out as Python does: a blank after commas and colons, or one item a line.
struct PythonJson<'a> {
    between_items: &'a str,
    after_key: &'a str,
    /// Blanks for each level; `None` for all on one line.
    indent: Option<usize>,
    depth: usize,
    /// Whether the array or object being written has no item so far.
    is_empty: bool,
}

impl PythonJson<'_> {
    fn open<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        bracket: &[u8],
    ) -> std::io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        bracket: &[u8],
    ) -> std::io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        is_first: bool,
    ) -> std::io::Result<()> {
        self.is_empty = false;
        if !is_first {
            writer.write_all(self.between_items.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            None => Ok(()),
            Some(blanks) => write!(
                writer,
                "\n{:width$}",
                "",
                width = blanks.saturating_mul(self.depth).min(1024)
            ),
        }
    }
}

impl serde_json::ser::Formatter for PythonJson<'_> {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(self.after_key.as_bytes())
    }
}

/// JSON text in ASCII. Characters outside it stand in strings only, so each becomes `\uXXXX` of its UTF-16 units.
fn escape_non_ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() {
            text.push(character);
        } else {
            let mut units = [0; 2];
            let units = character.encode_utf16(&mut units).iter();
            units.for_each(|unit| text.push_str(&format!("\\u{unit:04x}")));
        }
    }
    text
}

/// What a template said, and on which of its lines; for `raise_exception`, the template's own words.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(
        || error.kind().to_string(),
        |detail| match error.kind() {
            ErrorKind::InvalidOperation => detail.to_owned(),
            kind => format!("{kind}: {detail}"),
        },
    );
    error
        .line()
        .map_or_else(|| what.clone(), |line| format!("{what} (its line {line})"))
}
