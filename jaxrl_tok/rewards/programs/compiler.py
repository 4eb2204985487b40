"""Compiles statements to instructions; expressions are in expressions.py.

An instruction is (operation, argument), a function of ops.py. The stack of
values belongs to the frame. try is a stack of handlers: setup names where an
exception goes, pop_block takes it off; a finally block is written once for
every way out of it.
"""

import ast
import warnings

from jaxrl_tok.rewards.programs import control, ops
from jaxrl_tok.rewards.programs.expressions import Expressions, Label
from jaxrl_tok.rewards.programs.scopes import check_depth, make_scope
from jaxrl_tok.rewards.programs.values import (
  Budget,
  BudgetError,
  Code,
  LanguageError,
)

# special methods that a class of the program may define
_SPECIAL = (
  'init repr str eq ne lt le gt ge hash bool len getitem setitem delitem '
  'contains iter next call add radd sub rsub mul rmul truediv rtruediv '
  'floordiv rfloordiv mod rmod pow rpow and rand or ror xor rxor neg pos '
  'abs iadd isub imul'
)
SPECIAL_METHODS = frozenset(f'__{name}__' for name in _SPECIAL.split())


def parse(source: str, budget: Budget) -> ast.Module:
  """The syntax tree of a program. Raises SyntaxError, BudgetError."""
  if len(source) > budget.source:
    raise BudgetError(f'the source has more than {budget.source} characters')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      tree = ast.parse(source)
  except (RecursionError, MemoryError):
    raise BudgetError('the source is nested too deep to be parsed') from None
  except ValueError as e:  # null bytes, lone surrogates
    raise SyntaxError(str(e)) from None
  if check_depth(tree, budget.nesting) > budget.nesting:
    raise BudgetError(f'the source is nested deeper than {budget.nesting}')
  return tree


def compile_source(
  source: str,
  budget: Budget,
  builtin=frozenset(),
  strict: bool | None = False,
) -> Code:
  """The instructions of a program; names of `builtin` are always the built-in
  ones, where the program that ran before binds them too. strict: see Code."""
  tree = parse(source, budget)
  try:
    scope = make_scope('module', None, tree.body)
    code = Code('<module>', strict)
    unit = Compiler(scope, code, budget, builtin - scope.bound)
    unit.finish(tree.body)
  except RecursionError:
    raise BudgetError('the source is nested too deep to be compiled') from None
  return unit.code


class Block:
  """A statement around the one that is compiled, which a jump out of it must
  leave: a loop, a try, an except (with its name) or a finally (its body)."""

  def __init__(self, kind, start=None, end=None, name=None, body=None):
    self.kind = kind
    self.start = start
    self.end = end
    self.name = name
    self.body = body


class Compiler(Expressions):
  """Compiler of one function, class body or module."""

  def __init__(self, scope, code, budget, builtin):
    self.scope = scope
    self.base = scope
    self.code = code
    self.budget = budget
    self.builtin = builtin
    self.blocks = []
    self.line = 1
    self.total = [0]  # instructions of the whole program

  def child(self, scope, name: str) -> 'Compiler':
    code = Code(name, self.code.strict)
    unit = Compiler(scope, code, self.budget, self.builtin)
    unit.line, unit.total = self.line, self.total
    return unit

  def finish(self, body: list) -> Code:
    """Compiles a body and resolves its labels."""
    self.body(body)
    self.emit(ops.const, None)
    self.emit(control.leave)
    for i, (operation, argument) in enumerate(self.code.ops):
      if isinstance(argument, Label):
        self.code.ops[i] = (operation, argument.at)
    return self.code

  def emit(self, operation, argument=None) -> None:
    self.total[0] += 1
    if self.total[0] > self.budget.source:  # a finally inside a finally doubles
      raise BudgetError('the program has too many instructions')
    self.code.ops.append((operation, argument))
    self.code.lines.append(self.line)

  def mark(self, label: 'Label') -> None:
    label.at = len(self.code.ops)

  # --- statements

  def body(self, nodes: list) -> None:
    for node in nodes:
      self.statement(node)

  def statement(self, node) -> None:
    self.line = node.lineno
    name = type(node).__name__
    method = getattr(self, f'do_{name}', None)
    if method is None:
      raise LanguageError(
        f'line {self.line}: no {name} statement in the subset'
      )
    method(node)

  def do_Pass(self, node):
    pass

  do_Global = do_Nonlocal = do_Pass  # scopes.py has read them

  def do_Expr(self, node):
    value = getattr(node.value, 'value', None)
    is_text = isinstance(node.value, ast.Constant) and isinstance(value, str)
    if not is_text and value is not Ellipsis:  # a docstring, or ...
      self.expression(node.value)
      self.emit(ops.pop)

  def do_Assign(self, node):
    self.expression(node.value)
    for _ in node.targets[1:]:
      self.emit(ops.dup)
    for target in node.targets:
      self.store(target)

  def do_AnnAssign(self, node):
    if node.value is not None:
      self.expression(node.value)
      self.store(node.target)

  def do_AugAssign(self, node):
    operator, target = type(node.op).__name__, node.target
    if isinstance(target, ast.Name):
      self.load_name(target.id)
      self.expression(node.value)
      self.emit(ops.inplace, operator)
      self.store_name(target.id)
    elif isinstance(target, ast.Attribute):
      self.expression(target.value)
      self.emit(ops.dup)
      self.emit(ops.load_attr, self.attribute_name(target.attr))
      self.expression(node.value)
      self.emit(ops.inplace, operator)
      self.emit(ops.swap)
      self.emit(ops.store_attr, self.attribute_name(target.attr))
    else:
      self.expression(target.value)
      self.expression(target.slice)
      self.emit(ops.dup_two)
      self.emit(ops.subscript)
      self.expression(node.value)
      self.emit(ops.inplace, operator)
      self.emit(ops.lift_two)
      self.emit(ops.store_subscript)

  def do_Delete(self, node):
    for target in node.targets:
      self.delete(target)

  def delete(self, target) -> None:
    if isinstance(target, ast.Name):
      self.delete_name(target.id)
    elif isinstance(target, ast.Subscript):
      self.expression(target.value)
      self.expression(target.slice)
      self.emit(ops.delete_subscript)
    elif isinstance(target, ast.Attribute):
      self.expression(target.value)
      self.emit(ops.delete_attr, self.attribute_name(target.attr))
    else:
      for element in target.elts:
        self.delete(element)

  def do_If(self, node):
    end = Label()
    while True:  # elif is an if in an else
      other = Label()
      self.expression(node.test)
      self.emit(control.jump_if_false, other)
      self.body(node.body)
      if node.orelse:
        self.emit(control.jump, end)
      self.mark(other)
      if len(node.orelse) != 1 or not isinstance(node.orelse[0], ast.If):
        break
      node = node.orelse[0]
      self.line = node.lineno
    self.body(node.orelse)
    self.mark(end)

  def do_While(self, node):
    start, end, otherwise = Label(), Label(), Label()
    self.mark(start)
    self.expression(node.test)
    self.emit(control.jump_if_false, otherwise)
    self.blocks.append(Block('while', start, end))
    self.body(node.body)
    self.blocks.pop()
    self.emit(control.jump, start)
    self.mark(otherwise)
    self.body(node.orelse)
    self.mark(end)

  def do_For(self, node):
    start, end, otherwise = Label(), Label(), Label()
    self.expression(node.iter)
    self.emit(control.get_iter)
    self.mark(start)
    self.next_item(otherwise)
    self.blocks.append(Block('for', start, end))
    self.store(node.target)
    self.body(node.body)
    self.blocks.pop()
    self.emit(control.jump, start)
    self.mark(otherwise)
    self.body(node.orelse)
    self.mark(end)

  def do_Break(self, node):
    self.leave_loop('break')

  def do_Continue(self, node):
    self.leave_loop('continue')

  def leave_loop(self, word: str) -> None:
    kept = self.blocks
    for count, block in enumerate(reversed(kept)):
      if block.kind in ('for', 'while'):
        if word == 'break' and block.kind == 'for':
          self.emit(ops.pop)
        self.emit(control.jump, block.end if word == 'break' else block.start)
        self.blocks = kept
        return
      self.blocks = kept[: len(kept) - count - 1]
      self.unwind(block)
    raise SyntaxError(f'{word} outside loop, line {self.line}')

  def unwind(self, block: Block) -> None:
    """Leaves one block, on the way out of it."""
    if block.kind == 'try':
      self.emit(control.pop_block)
    elif block.kind == 'finally':
      self.emit(control.pop_block)
      self.body(block.body)
    elif block.kind == 'except':
      if block.name:
        self.emit(control.pop_block)
        self.unbind(block.name)
      self.emit(control.exit_handler)

  def do_Return(self, node):
    if self.base.kind != 'function':
      raise SyntaxError(f'return outside function, line {self.line}')
    if node.value is None:
      self.emit(ops.const, None)
    else:
      self.expression(node.value)
    kept = self.blocks
    if not any(block.kind == 'finally' for block in kept):
      self.emit(control.leave)
      return
    slot = len(self.code.ops)
    self.emit(ops.save_result, slot)
    for count, block in enumerate(reversed(kept)):
      self.blocks = kept[: len(kept) - count - 1]
      self.unwind(block)
    self.blocks = kept
    self.emit(ops.load_result, slot)
    self.emit(control.leave)

  def do_Raise(self, node):
    if node.exc is None:
      self.emit(control.raise_again)
      return
    self.expression(node.exc)
    if node.cause is not None:
      self.expression(node.cause)
      self.emit(ops.pop)
    self.emit(control.raise_value)

  def do_Assert(self, node):
    passed = Label()
    self.expression(node.test)
    self.emit(control.jump_if_true, passed)
    if node.msg is not None:
      self.expression(node.msg)
    self.emit(control.fail_assert, node.msg is not None)
    self.mark(passed)

  def do_Try(self, node):
    if not node.finalbody:
      self.try_except(node)
      return
    handler, end = Label(), Label()
    self.emit(control.setup, handler)
    self.blocks.append(Block('finally', body=node.finalbody))
    if node.handlers:
      self.try_except(node)
    else:
      self.body(node.body)
    self.blocks.pop()
    self.emit(control.pop_block)
    self.body(node.finalbody)
    self.emit(control.jump, end)
    self.mark(handler)
    self.emit(control.enter_handler)
    self.blocks.append(Block('except'))
    self.body(node.finalbody)
    self.blocks.pop()
    self.emit(control.raise_again)
    self.mark(end)

  def try_except(self, node) -> None:
    handler, end = Label(), Label()
    self.emit(control.setup, handler)
    self.blocks.append(Block('try'))
    self.body(node.body)
    self.blocks.pop()
    self.emit(control.pop_block)
    self.body(node.orelse)
    self.emit(control.jump, end)
    self.mark(handler)
    self.emit(control.enter_handler)
    for i, clause in enumerate(node.handlers):
      other = Label()
      self.line = clause.lineno
      if clause.type is not None:
        self.expression(clause.type)
        self.emit(control.match_handler)
        self.emit(control.jump_if_false, other)
      elif i + 1 < len(node.handlers):
        raise SyntaxError("default 'except:' must be last")
      self.handler_body(clause)
      self.emit(control.exit_handler)
      self.emit(control.jump, end)
      self.mark(other)
    self.emit(control.raise_again)
    self.mark(end)

  def handler_body(self, clause) -> None:
    """Body of an except clause; its name is unbound after it."""
    self.blocks.append(Block('except', name=clause.name))
    if clause.name is None:
      self.body(clause.body)
      self.blocks.pop()
      return
    failed, done = Label(), Label()
    self.emit(control.load_handled)
    self.store_name(clause.name)
    self.emit(control.setup, failed)
    self.body(clause.body)
    self.blocks.pop()
    self.emit(control.pop_block)
    self.unbind(clause.name)
    self.emit(control.jump, done)
    self.mark(failed)
    self.emit(control.enter_handler)
    self.unbind(clause.name)
    self.emit(control.raise_again)
    self.mark(done)

  def unbind(self, name: str) -> None:
    self.emit(ops.const, None)
    self.store_name(name)
    self.delete_name(name)

  def do_FunctionDef(self, node):
    self.check_definition(node.name)
    for decorator in node.decorator_list:
      self.expression(decorator)
    self.function(node.name, node.args, node.body)
    for _ in node.decorator_list:
      self.emit(control.call, (1, ()))
    self.store_name(node.name, definition=True)

  def check_definition(self, name: str) -> None:
    if name.startswith('__') and name.endswith('__'):
      allowed = self.scope.kind == 'class' and name in SPECIAL_METHODS
      if not allowed:
        raise LanguageError(f'line {self.line}: no {name} in the subset')

  def do_ClassDef(self, node):
    self.check_definition(node.name)
    if node.keywords or len(node.bases) > 1:
      raise LanguageError(
        f'line {self.line}: a class has one base at most in the subset'
      )
    for decorator in node.decorator_list:
      self.expression(decorator)
    for base in node.bases:
      self.expression(base)
    scope = make_scope('class', self.scope, node.body, [node.name])
    unit = self.child(scope, node.name)
    code = unit.finish(node.body)
    self.emit(control.build_class, (code, len(node.bases)))
    for _ in node.decorator_list:
      self.emit(control.call, (1, ()))
    self.store_name(node.name)

  def do_Import(self, node):
    for alias in node.names:
      self.emit(control.import_module, (alias.name, None, self.line))
      self.store_name(alias.asname or alias.name)

  def do_ImportFrom(self, node):
    for alias in node.names:
      self.emit(control.import_module, (node.module, alias.name, self.line))
      if alias.name == '*':
        raise LanguageError(f'line {self.line}: no import * in the subset')
      self.store_name(alias.asname or alias.name)
