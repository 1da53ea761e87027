"""How are the imports in Python source rewritten, and what is left for a person to look at?

With libcst, which keeps every space and comment, and knows which names an import has bound. Only what is certain is
changed: import statements, and the name ``transformer_lens`` where such a statement has bound it. What has no
counterpart, and text that names TransformerLens, is left as it is and remarked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst
from libcst import metadata
from libcst.helpers import get_full_name_for_node

from . import names


@dataclass(frozen=True, order=True)
class Remark:
    """Something that was left as it is: the line, counted from 1, and why."""

    line: int
    text: str


def rewrite(source: str) -> tuple[str, list[Remark]]:
    """The source with lensbridge's imports, and what could not be mapped, in the order of lines.

    Raises:
        SyntaxError: the source is not Python.
    """
    try:
        module = metadata.MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    except cst.ParserSyntaxError as error:
        raise SyntaxError(f"line {error.raw_line}: {error.message}") from error
    rewriter = _Rewriter()
    return module.visit(rewriter).code, sorted(set(rewriter.remarks))


class _Rewriter(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (
        metadata.PositionProvider,
        metadata.QualifiedNameProvider,
        metadata.ParentNodeProvider,
    )

    def __init__(self) -> None:
        super().__init__()
        self.remarks: list[Remark] = []
        #: Import statements of which a part stays -> that part.
        self.rest: dict[cst.CSTNode, cst.ImportFrom] = {}

    def remark(self, node: cst.CSTNode, text: str) -> None:
        self.remarks.append(Remark(self.get_metadata(metadata.PositionProvider, node).start.line, text))

    # --- import statements ---

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        return updated_node.with_changes(names=[self._import_alias(alias) for alias in updated_node.names])

    def _import_alias(self, alias: cst.ImportAlias) -> cst.ImportAlias:
        theirs = alias.evaluated_name
        if not names.is_theirs(theirs):
            return alias
        ours = names.module_of(theirs)
        if ours is None:
            self.remark(alias, names.why_missing(theirs))
            return alias
        if alias.asname is None:
            # The statement binds the package; what follows goes through attributes, which are called as before.
            ours = names.OURS + theirs.removeprefix(names.THEIRS)
        return alias.with_changes(name=_dotted(ours))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def leave_ImportFrom(self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom) -> cst.ImportFrom:
        theirs = get_full_name_for_node(original_node.module) if original_node.module is not None else None
        if theirs is None or original_node.relative or not names.is_theirs(theirs):
            return updated_node
        ours = names.module_of(theirs)
        if ours is None:
            self.remark(original_node, names.why_missing(theirs))
            return updated_node
        renamed = updated_node.with_changes(module=_dotted(ours))
        if isinstance(original_node.names, cst.ImportStar):
            return renamed
        found: list[cst.ImportAlias] = []
        lost: list[cst.ImportAlias] = []
        for alias in original_node.names:
            name = names.member_of(ours, alias.evaluated_name)
            if name is None:
                self.remark(alias, names.why_missing(f"{theirs}.{alias.evaluated_name}", ours, alias.evaluated_name))
                lost.append(alias)
            else:
                found.append(_named(alias, name))
        if not found:
            return updated_node
        if lost:
            self.rest[original_node] = cst.ImportFrom(module=original_node.module, names=_bare(lost))
            # In parentheses, the comma after the last name may stay, and the line break behind it with it.
            return renamed.with_changes(names=found if original_node.lpar is not None else _closed(found))
        return renamed.with_changes(names=found)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        rest = [self.rest[part] for part in original_node.body if part in self.rest]
        if not rest:
            return updated_node
        return cst.FlattenSentinel([updated_node, *(cst.SimpleStatementLine([part]) for part in rest)])

    # --- names that an import has bound ---

    def visit_Attribute(self, node: cst.Attribute) -> None:
        if not isinstance(self.get_metadata(metadata.ParentNodeProvider, node), cst.Attribute):
            for name in self._theirs(node):
                problem = names.missing(name)
                if problem is not None:
                    self.remark(node, problem)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        if original_node.value != names.THEIRS or not self._is_read(original_node):
            return updated_node
        return updated_node.with_changes(value=names.OURS) if self._theirs(original_node) else updated_node

    def _is_read(self, node: cst.Name) -> bool:
        parent = self.get_metadata(metadata.ParentNodeProvider, node)
        is_attribute = isinstance(parent, cst.Attribute) and parent.attr is node
        return not is_attribute and not (isinstance(parent, cst.Arg) and parent.keyword is node)

    def _theirs(self, node: cst.CSTNode) -> list[str]:
        """What of TransformerLens an expression can be."""
        found = self.get_metadata(metadata.QualifiedNameProvider, node, ())
        imported = [name.name for name in found if name.source is metadata.QualifiedNameSource.IMPORT]
        return [name for name in imported if names.is_theirs(name)]

    # --- text ---

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        self._text(node, node.value)

    def visit_FormattedStringText(self, node: cst.FormattedStringText) -> None:
        self._text(node, node.value)

    def _text(self, node: cst.CSTNode, text: str) -> None:
        is_prose = isinstance(self.get_metadata(metadata.ParentNodeProvider, node), cst.Expr)
        if not is_prose and names.THEIRS in text.replace("-", "_"):
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            self.remark(node, f"text that names TransformerLens: {shown}")


def _dotted(name: str) -> cst.Attribute | cst.Name:
    first, *others = name.split(".")
    node: cst.Attribute | cst.Name = cst.Name(first)
    for part in others:
        node = cst.Attribute(node, cst.Name(part))
    return node


def _named(alias: cst.ImportAlias, name: str) -> cst.ImportAlias:
    """The import of another name, bound as before."""
    if name == alias.evaluated_name:
        return alias
    bound = alias.asname or cst.AsName(cst.Name(alias.evaluated_name))
    return alias.with_changes(name=cst.Name(name), asname=bound)


def _bare(aliases: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """As names of a statement of their own, on one line."""
    return _closed(
        [alias.with_changes(comma=cst.Comma(cst.SimpleWhitespace(""), cst.SimpleWhitespace(" "))) for alias in aliases]
    )


def _closed(aliases: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Without a comma after the last one, which only parentheses allow."""
    return [*aliases[:-1], aliases[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]
