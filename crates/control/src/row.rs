//! Rows: what a command is called, what it takes and returns, and what its arguments become.
//!
//! A row stands below the code of its command; `table.rs` lists the rows. A command that has none does not exist.

use dolmen_qmp::schema::{Command, NOTHING, Ty};
use dolmen_qmp::{QmpError, Schema};
use dolmen_types::Options;

use crate::act::{Act, Edit, Publish};
use crate::counter::CounterRow;
use crate::world::{Answer, World};

/// Reads the arguments of a command.
pub(crate) type Make<T> = fn(&MakeCx<'_>, Options) -> Result<Box<T>, QmpError>;

/// What a command does with its arguments.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// Shows the state of things as it is, at once.
    Query(fn(&World, Options) -> Answer),
    /// Is done at once, beside the task: it publishes nothing.
    Verb(Make<dyn Act>),
    /// Is done by the task, when its turn comes.
    Change(Make<dyn Act>),
    /// The same, and done when its draft is published.
    Edit(Make<dyn Edit>),
}

/// What the maker of an act may look at, beside the arguments.
pub(crate) struct MakeCx<'a> {
    /// The command.
    pub(crate) name: &'static str,
    /// All commands.
    pub(crate) table: Table,
    pub(crate) schema: &'a Schema,
}

#[derive(Clone, Copy)]
pub(crate) struct CommandRow {
    pub(crate) schema: Command,
    pub(crate) kind: Kind,
    /// Ends the program: it is not to wait for long behind another command of the same client.
    pub(crate) ends_program: bool,
}

impl CommandRow {
    const fn new(name: &'static str, arguments: Ty, kind: Kind, help: &'static str) -> CommandRow {
        let schema =
            Command { name, arguments, returns: NOTHING, features: &[], in_transactions: false, help };
        CommandRow { schema, kind, ends_program: false }
    }

    pub(crate) const fn query(
        name: &'static str,
        arguments: Ty,
        returns: Ty,
        run: fn(&World, Options) -> Answer,
        help: &'static str,
    ) -> CommandRow {
        CommandRow::new(name, arguments, Kind::Query(run), help).returns(returns)
    }

    pub(crate) const fn verb(
        name: &'static str,
        arguments: Ty,
        make: Make<dyn Act>,
        help: &'static str,
    ) -> CommandRow {
        CommandRow::new(name, arguments, Kind::Verb(make), help)
    }

    pub(crate) const fn change(
        name: &'static str,
        arguments: Ty,
        make: Make<dyn Act>,
        help: &'static str,
    ) -> CommandRow {
        CommandRow::new(name, arguments, Kind::Change(make), help)
    }

    pub(crate) const fn edit(
        name: &'static str,
        arguments: Ty,
        make: Make<dyn Edit>,
        help: &'static str,
    ) -> CommandRow {
        CommandRow::new(name, arguments, Kind::Edit(make), help)
    }

    pub(crate) const fn returns(mut self, returns: Ty) -> CommandRow {
        self.schema.returns = returns;
        self
    }

    pub(crate) const fn features(mut self, features: &'static [&'static str]) -> CommandRow {
        self.schema.features = features;
        self
    }

    /// It can be an action of a transaction. Only an edit can: what has something to do after the commit could fail when
    /// the rest of the transaction is done.
    pub(crate) const fn in_transactions(mut self) -> CommandRow {
        assert!(matches!(self.kind, Kind::Edit(_)), "only edits are part of transactions");
        self.schema.in_transactions = true;
        self
    }

    pub(crate) const fn ends_program(mut self) -> CommandRow {
        self.ends_program = true;
        self
    }

    /// The act that arguments ask for; `None` for queries.
    ///
    /// # Errors
    /// When arguments make no sense together.
    pub(crate) fn act(
        &self,
        table: Table,
        schema: &Schema,
        arguments: Options,
    ) -> Result<Option<Box<dyn Act>>, QmpError> {
        let cx = MakeCx { name: self.schema.name, table, schema };
        Ok(match self.kind {
            Kind::Query(_) => None,
            Kind::Verb(make) | Kind::Change(make) => Some(make(&cx, arguments)?),
            Kind::Edit(make) => Some(Box::new(Publish::new(make(&cx, arguments)?))),
        })
    }
}

/// The rows of a file of commands.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    commands: &'static [CommandRow],
    counters: &'static [CounterRow],
}

impl Family {
    pub(crate) const fn of(commands: &'static [CommandRow]) -> Family {
        Family { commands, counters: &[] }
    }

    /// With counters that they add to those of exports.
    pub(crate) const fn with_counters(
        commands: &'static [CommandRow],
        counters: &'static [CounterRow],
    ) -> Family {
        Family { commands, counters }
    }
}

/// All rows, by family.
#[derive(Clone, Copy)]
pub(crate) struct Table(pub(crate) &'static [Family]);

impl Table {
    pub(crate) fn rows(self) -> impl Iterator<Item = &'static CommandRow> {
        self.0.iter().flat_map(|family| family.commands)
    }

    pub(crate) fn counters(self) -> impl Iterator<Item = CounterRow> {
        self.0.iter().flat_map(|family| family.counters).copied()
    }

    /// # Errors
    /// `CommandNotFound`.
    pub(crate) fn find(self, name: &str) -> Result<&'static CommandRow, QmpError> {
        self.rows()
            .find(|r| r.schema.name == name)
            .ok_or_else(|| QmpError::command_not_found(format!("The command {name} has not been found")))
    }
}
